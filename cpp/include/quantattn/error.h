#pragma once

#include <stdexcept>

#include "quantattn/api.h"

namespace quantattn {

// Messages read "who: rule, got value", for example
// "decode_attention: num_q_heads must be a multiple of num_kv_heads, got 6 and 4".

// An argument breaks a rule of the call.
class QATTN_API InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// The call is well formed, but this build or this machine has no kernel for it.
class QATTN_API Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The device reported an error: a failed launch, an earlier asynchronous fault, no memory.
class QATTN_API DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace quantattn
