//! Values in SQL text.

/// `text` as an SQL string literal, safe whatever it holds and whatever `standard_conforming_strings` is.
pub fn literal(text: &str) -> String {
    postgres_protocol::escape::escape_literal(text)
}

/// `name` as an SQL identifier, in double quotes; also for slot names in replication commands.
pub fn identifier(name: &str) -> String {
    postgres_protocol::escape::escape_identifier(name)
}

#[cfg(test)]
mod tests {
    #[test]
    fn quotes_and_backslashes_are_doubled() {
        assert_eq!(super::literal("it's"), "'it''s'");
        assert_eq!(super::literal(r"a\b"), r" E'a\\b'");
        assert_eq!(super::identifier(r#"a"b"#), r#""a""b""#);
    }
}
