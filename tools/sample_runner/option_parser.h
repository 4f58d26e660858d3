#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

// A command line as a table: one row per option, from which parsing, errors and --help are derived.
namespace sample_runner {

// The command line breaks a rule; the message says what is allowed.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Option {
  std::string_view name;                      // with its dashes; empty for a heading, whose text is `help`
  std::string_view value;                     // what the help calls the value; empty for a switch
  std::string help;                           // allowed values and default
  std::function<void(std::string_view)> set;  // a switch gets an empty text; throws UsageError
};

// Accepts "--name value" and "--name=value". Throws UsageError for anything that the table does not allow,
// an option given twice included.
void parse_options(std::span<const std::string_view> arguments, std::span<const Option> options);

std::string describe(std::span<const Option> options);

// Readers of one value. `who` is the option's name.
std::string parse_text(std::string_view who, std::string_view text);
int64_t parse_integer(std::string_view who, std::string_view text, int64_t least, int64_t most);
double parse_number(std::string_view who, std::string_view text);
std::vector<float> parse_numbers(std::string_view who, std::string_view text);  // comma separated, at least one
std::vector<std::string_view> split(std::string_view text, char separator);

// The index of `text` in `allowed`.
size_t parse_choice(std::string_view who, std::string_view text, std::span<const std::string_view> allowed);
bool parse_on_off(std::string_view who, std::string_view text);

[[noreturn]] void fail_usage(std::string_view who, std::string_view rule, std::string_view got);

}  // namespace sample_runner
