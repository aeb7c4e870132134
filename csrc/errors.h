#pragma once

// Errors, their messages put together without a stream: see pytorch.h.

#include <concepts>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "pytorch.h"

namespace ssp {

inline std::string text(const char* value) { return value; }
inline std::string text(const std::string& value) { return value; }
inline std::string text(torch::headeronly::ScalarType value) {
  return torch::headeronly::toString(value);
}
inline std::string text(std::integral auto value) { return std::to_string(value); }
inline std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", value);
  return digits;
}

template <class... Values>
std::runtime_error error(const Values&... values) {
  std::string message;
  ((message += text(values)), ...);
  return std::runtime_error(message);
}

}  // namespace ssp

// Raises an error of the text of all other arguments, which are evaluated only then.
#define SSP_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]  \
  throw ssp::error(__VA_ARGS__)
