#pragma once

#include <sstream>

#include "quantattn/error.h"

namespace quantattn {

template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// who: rule, got value
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]]
    fail<InvalidArgument>(parts...);
}

}  // namespace quantattn
