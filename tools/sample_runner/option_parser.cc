#include "option_parser.h"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace sample_runner {
namespace {

std::string join(std::span<const std::string_view> parts) {
  std::string joined;
  for (std::string_view part : parts) {
    if (!joined.empty()) joined += ", ";
    joined += part;
  }
  return joined;
}

const Option& find_option(std::string_view name, std::span<const Option> options) {
  std::vector<std::string_view> allowed;
  for (const Option& option : options) {
    if (option.name.empty()) continue;
    if (option.name == name) return option;
    allowed.push_back(option.name);
  }
  throw UsageError("unknown option '" + std::string(name) + "', allowed: " + join(allowed));
}

template <class Number>
bool read_whole(std::string_view text, Number& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc{} && end == text.data() + text.size();
}

}  // namespace

void fail_usage(std::string_view who, std::string_view rule, std::string_view got) {
  throw UsageError(std::string(who) + " must be " + std::string(rule) + ", got '" + std::string(got) + "'");
}

void parse_options(std::span<const std::string_view> arguments, std::span<const Option> options) {
  std::vector<std::string_view> given;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string_view argument = arguments[i];
    const size_t equals = argument.starts_with("--") ? argument.find('=') : std::string_view::npos;
    const Option& option = find_option(argument.substr(0, equals), options);
    if (std::ranges::find(given, option.name) != given.end())
      throw UsageError(std::string(option.name) + " must be given at most once");
    given.push_back(option.name);
    const bool is_switch = option.value.empty();
    if (is_switch && equals != std::string_view::npos)
      throw UsageError(std::string(option.name) + " takes no value, got '" + std::string(argument) + "'");
    if (is_switch) {
      option.set({});
    } else if (equals != std::string_view::npos) {
      option.set(argument.substr(equals + 1));
    } else {
      if (i + 1 == arguments.size())
        throw UsageError(std::string(option.name) + " needs a value: " + std::string(option.value));
      option.set(arguments[++i]);
    }
  }
}

std::string describe(std::span<const Option> options) {
  constexpr size_t kColumn = 34;
  std::string text;
  for (const Option& option : options) {
    if (option.name.empty()) {
      text.append(1, '\n').append(option.help).append(1, '\n');
      continue;
    }
    std::string line("  ");
    line.append(option.name);
    if (!option.value.empty()) line.append(1, ' ').append(option.value);
    if (line.size() + 1 < kColumn)
      line.append(kColumn - line.size(), ' ');
    else
      line.append(1, '\n').append(kColumn, ' ');
    for (char c : option.help) {
      line += c;
      if (c == '\n') line.append(kColumn, ' ');
    }
    text.append(line).append(1, '\n');
  }
  return text;
}

std::string parse_text(std::string_view who, std::string_view text) {
  if (text.empty()) fail_usage(who, "a text that is not empty", text);
  return std::string(text);
}

int64_t parse_integer(std::string_view who, std::string_view text, int64_t least, int64_t most) {
  int64_t number = 0;
  if (!read_whole(text, number) || number < least || number > most)
    fail_usage(who, "an integer in [" + std::to_string(least) + ", " + std::to_string(most) + "]", text);
  return number;
}

double parse_number(std::string_view who, std::string_view text) {
  double number = 0;
  if (!read_whole(text, number) || !std::isfinite(number)) fail_usage(who, "a finite number", text);
  return number;
}

std::vector<float> parse_numbers(std::string_view who, std::string_view text) {
  std::vector<float> numbers;
  for (std::string_view part : split(text, ',')) {
    numbers.push_back(static_cast<float>(parse_number(who, part)));
    if (!std::isfinite(numbers.back())) fail_usage(who, "numbers that are finite in float32", part);
  }
  return numbers;
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t start = 0;;) {
    const size_t end = text.find(separator, start);
    parts.push_back(text.substr(start, end - start));
    if (end == std::string_view::npos) return parts;
    start = end + 1;
  }
}

size_t parse_choice(std::string_view who, std::string_view text, std::span<const std::string_view> allowed) {
  for (size_t i = 0; i < allowed.size(); ++i)
    if (allowed[i] == text) return i;
  fail_usage(who, "one of " + join(allowed), text);
}

bool parse_on_off(std::string_view who, std::string_view text) {
  static constexpr std::string_view kAllowed[] = {"on", "off", "true", "false"};
  return parse_choice(who, text, kAllowed) % 2 == 0;
}

}  // namespace sample_runner
