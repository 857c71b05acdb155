// As much JSON as it takes to read the manifest of an artifact.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

class Json {
 public:
  using Items = std::vector<Json>;
  using Members = std::vector<std::pair<std::string, Json>>;  // in the order of the text

  // Throws std::runtime_error where the text is not JSON.
  static Json parse(std::string_view text);

  // The member of an object. Throws std::runtime_error if it is no object, or has no such member.
  const Json& operator[](std::string_view key) const;

  // The content. All throw std::runtime_error if it is of another kind.
  bool is_null() const { return std::holds_alternative<std::monostate>(content_); }
  const std::string& text() const;
  std::int64_t integer() const;
  const Items& items() const;
  const Members& members() const;

 private:
  friend class JsonReader;

  std::variant<std::monostate, bool, double, std::string, Items, Members> content_;
};
