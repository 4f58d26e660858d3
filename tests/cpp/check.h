#pragma once

#include <sstream>
#include <string>

// A check that fails prints where and what, and makes the program exit with 1 at the end.
namespace quantattn_test {

void report_failure(const char* file, int line, const std::string& message);
// What main returns: 1 after any failure. Prints one line about `program`.
int finish(const char* program);

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace quantattn_test

#define CHECK(condition, ...)                                                                                                 \
  do {                                                                                                                        \
    if (!(condition)) quantattn_test::report_failure(__FILE__, __LINE__, quantattn_test::text(#condition ": ", __VA_ARGS__)); \
  } while (false)

// `statement` must throw `Error` with a message that contains `part`.
#define CHECK_THROWS(statement, Error, part)                                                                           \
  do {                                                                                                                 \
    std::string message_ = "nothing was thrown";                                                                       \
    try {                                                                                                              \
      statement;                                                                                                       \
    } catch (const Error& error) {                                                                                     \
      message_ = error.what();                                                                                         \
    }                                                                                                                  \
    if (message_.find(part) == std::string::npos)                                                                      \
      quantattn_test::report_failure(__FILE__, __LINE__, quantattn_test::text("expected \"", part, "\": ", message_)); \
  } while (false)
