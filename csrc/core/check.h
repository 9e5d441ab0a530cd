// What every kernel says of a bad argument: which kernel, which argument, what was expected, what came.
// Plain strings, no streams: where a toolchain links libstdc++ into the module, its streams and torch's do not mix.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace megatron_rl {

template <class Value>
std::string text_of(const Value& value) {
    if constexpr (std::is_arithmetic_v<Value>) return std::to_string(value);
    else return std::string(value);
}

template <class Expected, class Got>
std::string refusal(const char* kernel, const std::string& argument, const Expected& expected, const Got& got) {
    return std::string(kernel) + ": " + argument + ": expected " + text_of(expected) + ", got " + text_of(got);
}

template <class Expected, class Got>
[[noreturn]] void refuse(const char* kernel, const std::string& argument, const Expected& expected, const Got& got) {
    throw std::invalid_argument(refusal(kernel, argument, expected, got));  // ValueError in Python
}

}  // namespace megatron_rl
