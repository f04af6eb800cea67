// Text in JSON, for what the libraries say of themselves.
#pragma once

#include <string>

namespace fpet::binding {

inline std::string quoted(const char* text) {
  std::string result = "\"";
  for (; *text; ++text) {
    if (*text == '"' || *text == '\\') result += '\\';
    result += *text;
  }
  return result + '"';
}

}  // namespace fpet::binding
