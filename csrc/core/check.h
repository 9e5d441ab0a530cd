// What every kernel says of a bad argument: which kernel, which argument, what was expected, what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace megatron_rl {

template <class Expected, class Got>
[[noreturn]] void refuse(const char* kernel, const std::string& argument, const Expected& expected, const Got& got) {
    std::ostringstream text;
    text << kernel << ": " << argument << ": expected " << expected << ", got " << got;
    throw std::invalid_argument(text.str());  // ValueError in Python
}

}  // namespace megatron_rl
