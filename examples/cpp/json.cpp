#include "json.h"

#include <charconv>
#include <cstdlib>
#include <stdexcept>

namespace {

template <class Kind, class Content>
const Kind& as(const Content& content, const char* kind) {
  if (const auto* found = std::get_if<Kind>(&content)) return *found;
  throw std::runtime_error(std::string("JSON: found something else where ") + kind + " should be");
}

}  // namespace

// Reads one text from its beginning to its end.
class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json document() {
    Json json = value();
    skip_space();
    if (next_ != text_.size()) fail("an end");
    return json;
  }

 private:
  Json value() {
    Json json;
    switch (peek()) {
      case '{': json.content_ = members(); break;
      case '[': json.content_ = items(); break;
      case '"': json.content_ = string(); break;
      default: word(json);
    }
    return json;
  }

  Json::Members members() {
    Json::Members members;
    take('{');
    if (take_if('}')) return members;
    do {
      std::string key = (peek(), string());
      take(':');
      members.emplace_back(std::move(key), value());
    } while (take_if(','));
    take('}');
    return members;
  }

  Json::Items items() {
    Json::Items items;
    take('[');
    if (take_if(']')) return items;
    do {
      items.push_back(value());
    } while (take_if(','));
    take(']');
    return items;
  }

  std::string string() {
    std::string result;
    take('"');
    while (next_ < text_.size() && text_[next_] != '"') {
      char letter = text_[next_++];
      if (letter == '\\') {
        escaped(result);
      } else {
        result += letter;
      }
    }
    if (next_ == text_.size()) fail("a closing quote");
    ++next_;
    return result;
  }

  void escaped(std::string& result) {
    constexpr std::string_view letters = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
    char letter = next_ < text_.size() ? text_[next_++] : '\0';
    if (letter == 'u') {
      std::uint32_t code = hex4();
      if (code >= 0xD800 && code < 0xDC00 && text_.substr(next_, 2) == "\\u") {
        next_ += 2;
        code = 0x10000 + ((code - 0xD800) << 10) + (hex4() - 0xDC00);
      }
      append_utf8(result, code);
    } else if (auto place = letters.find(letter); place != std::string_view::npos) {
      result += meant[place];
    } else {
      fail("an escape");
    }
  }

  std::uint32_t hex4() {
    std::uint32_t code = 0;
    std::string_view digits = text_.substr(next_, 4);
    auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (error != std::errc() || end != digits.data() + 4) fail("four hexadecimal digits");
    next_ += 4;
    return code;
  }

  static void append_utf8(std::string& result, std::uint32_t code) {
    if (code < 0x80) {
      result += static_cast<char>(code);
      return;
    }
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes behind the first
    constexpr unsigned char first[] = {0, 0xC0, 0xE0, 0xF0};
    result += static_cast<char>(first[more] | (code >> (6 * more)));
    while (more-- > 0) result += static_cast<char>(0x80 | ((code >> (6 * more)) & 0x3F));
  }

  void word(Json& json) {
    std::size_t end = text_.find_first_of(",]} \t\r\n", next_);
    std::string word(text_.substr(next_, end == std::string_view::npos ? end : end - next_));
    if (word == "true" || word == "false") {
      json.content_ = word == "true";
    } else if (word != "null") {
      char* rest = nullptr;
      json.content_ = std::strtod(word.c_str(), &rest);  // takes NaN and Infinity, as Python writes them
      if (word.empty() || *rest != '\0') fail("a value");
    }
    next_ += word.size();
  }

  void skip_space() { next_ = std::min(text_.find_first_not_of(" \t\r\n", next_), text_.size()); }

  char peek() {
    skip_space();
    return next_ < text_.size() ? text_[next_] : '\0';
  }

  bool take_if(char wanted) {
    bool found = peek() == wanted && next_ < text_.size();
    if (found) ++next_;
    return found;
  }

  void take(char wanted) {
    if (!take_if(wanted)) fail(std::string(1, wanted));
  }

  [[noreturn]] void fail(const std::string& wanted) const {
    throw std::runtime_error("JSON: no " + wanted + " at byte " + std::to_string(next_));
  }

  std::string_view text_;
  std::size_t next_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).document(); }

const Json& Json::operator[](std::string_view key) const {
  for (const auto& [name, member] : members()) {
    if (name == key) return member;
  }
  throw std::runtime_error("JSON: no member '" + std::string(key) + "'");
}

const std::string& Json::text() const { return as<std::string>(content_, "a string"); }

std::int64_t Json::integer() const { return static_cast<std::int64_t>(as<double>(content_, "a number")); }

const Json::Items& Json::items() const { return as<Items>(content_, "a list"); }

const Json::Members& Json::members() const { return as<Members>(content_, "an object"); }
