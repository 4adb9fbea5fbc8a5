//! PostgreSQL's configuration files as text: read a line, quote a value, cut and put blocks. No I/O.

/// The line that gives `name` the value `value`.
pub fn setting(name: &str, value: &str) -> String {
    format!("{name} = {}", quote_config(value))
}

/// A value as the configuration file wants it: quotes doubled, backslashes too, no line breaks
/// ("src/backend/utils/misc/guc-file.l").
pub fn quote_config(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('\'');
    for character in value.chars() {
        match character {
            '\'' => quoted.push_str("''"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            other => quoted.push(other),
        }
    }
    quoted.push('\'');
    quoted
}

/// One word for `sh`, whatever is in it.
pub fn quote_shell(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The name and the rest of a setting's line; `None` for comments, blank lines and includes.
fn name_of(line: &str) -> Option<(String, &str)> {
    word_of(line).filter(|(name, _)| !is_include(name))
}

/// True of the lines that read another file or folder.
pub fn is_include(name: &str) -> bool {
    ["include", "include_if_exists", "include_dir"].contains(&name)
}

/// What reads another file or folder, and its path.
pub fn include_of(line: &str) -> Option<(String, String)> {
    let (name, rest) = word_of(line).filter(|(name, _)| is_include(name))?;
    Some((name, unquote(rest))).filter(|(_, path)| !path.is_empty())
}

fn word_of(line: &str) -> Option<(String, &str)> {
    let line = line.trim_start();
    let end = line
        .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'))
        .unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    (!name.is_empty()).then(|| (name.to_ascii_lowercase(), rest))
}

/// A value as written after the name: quotes taken off, a comment cut.
fn unquote(rest: &str) -> String {
    let rest = rest.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    let Some(quoted) = rest.strip_prefix('\'') else {
        return rest
            .split(|c: char| c.is_whitespace() || c == '#')
            .next()
            .unwrap_or_default()
            .to_string();
    };
    let mut value = String::new();
    let mut characters = quoted.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\'' if characters.peek() == Some(&'\'') => {
                characters.next();
                value.push('\'');
            }
            '\'' => break,
            '\\' => value.extend(characters.next()),
            other => value.push(other),
        }
    }
    value
}

/// The value that a file gives `name`: the last one counts. Includes are not followed.
pub fn value_of(text: &str, name: &str) -> Option<String> {
    let lines = text.lines().filter_map(name_of);
    lines.filter(|(found, _)| found == name).map(|(_, rest)| unquote(rest)).next_back()
}

/// Puts a `#` before the settings and includes that `is_off` picks by name and value. Returns the text and the lines.
pub fn comment_out(text: &str, is_off: impl Fn(&str, &str) -> bool) -> (String, Vec<String>) {
    let mut off = Vec::new();
    let mut after = String::with_capacity(text.len());
    for line in text.lines() {
        if word_of(line).is_some_and(|(name, rest)| is_off(&name, &unquote(rest))) {
            off.push(line.trim().to_string());
            after.push_str("# not in the restored copy: ");
        }
        after.push_str(line);
        after.push('\n');
    }
    (after, off)
}

fn begin_of(block: &str) -> String {
    format!("# backstay {block} settings begin")
}

fn end_of(block: &str) -> String {
    format!("# backstay {block} settings end")
}

/// A block of lines between marks.
pub fn block(name: &str, lines: &[String]) -> String {
    format!("{}\n{}\n{}\n", begin_of(name), lines.join("\n"), end_of(name))
}

/// The text without one of our blocks.
pub fn without_block(text: &str, name: &str) -> String {
    let (begin, end) = (begin_of(name), end_of(name));
    let mut inside = false;
    let mut kept = String::with_capacity(text.len());
    for line in text.lines() {
        inside |= line == begin;
        if !inside {
            kept.push_str(line);
            kept.push('\n');
        }
        inside &= line != end;
    }
    kept
}

/// The text without these settings, where a line gives one of them the same value.
pub fn without_lines(text: &str, settings: &[String]) -> String {
    let parsed = |line: &str| name_of(line).map(|(name, rest)| (name, unquote(rest)));
    let gone: Vec<_> = settings.iter().filter_map(|line| parsed(line)).collect();
    let kept = text.lines().filter(|line| !parsed(line).is_some_and(|line| gone.contains(&line)));
    kept.flat_map(|line| [line, "\n"]).collect()
}

/// The text without any of our blocks and without the settings that `is_stale` names; and the lines of those.
pub fn clean(text: &str, is_stale: impl Fn(&str) -> bool) -> (String, Vec<String>) {
    let text = ["recovery", "safety"]
        .iter()
        .fold(text.to_string(), |text, name| without_block(&text, name));
    let mut dropped = Vec::new();
    let mut kept = String::with_capacity(text.len());
    for line in text.lines() {
        if name_of(line).is_some_and(|(name, _)| is_stale(&name)) {
            dropped.push(line.trim().to_string());
        } else {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    (kept, dropped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn quoted_values_read_back(value in "[^\r\n\0]*") {
            let line = setting("restore_command", &value);
            prop_assert_eq!(value_of(&line, "restore_command"), Some(value));
        }

        #[test]
        fn the_shell_gets_the_word_as_it_is(word in "[^\0]{0,40}") {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quote_shell(&word))])
                .output()
                .unwrap();
            prop_assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }

    #[test]
    fn the_last_value_counts() {
        let text =
            "Port = 5433 # comment\n#port = 1\n  port 5434\narchive_command='cp ''%p'' x' # y\n";
        assert_eq!(value_of(text, "port").as_deref(), Some("5434"));
        assert_eq!(value_of(text, "archive_command").as_deref(), Some("cp '%p' x"));
        assert_eq!(value_of(text, "portal"), None);
        let include = |line| include_of(line).unwrap_or_default();
        assert_eq!(include(" Include_Dir = 'conf.d' # x"), ("include_dir".into(), "conf.d".into()));
        assert_eq!(include("include x.conf"), ("include".into(), "x.conf".into()));
        assert_eq!(include_of("#include 'x'"), None);
    }

    #[test]
    fn blocks_come_and_go() {
        let text = "a = 1\n".to_string() + &block("recovery", &["b = 2".into()]) + "c = 3\n";
        assert_eq!(value_of(&text, "b").as_deref(), Some("2"));
        assert_eq!(without_block(&text, "recovery"), "a = 1\nc = 3\n");
        let (kept, dropped) = clean(&text, |name| name == "c");
        assert_eq!((kept.as_str(), dropped), ("a = 1\n", vec!["c = 3".to_string()]));
    }

    #[test]
    fn settings_are_commented_out_once() {
        let (text, off) =
            comment_out("hba_file = '/etc/x'\nport = 1\n", |name, _| name == "hba_file");
        assert_eq!(off, ["hba_file = '/etc/x'"]);
        assert_eq!(value_of(&text, "hba_file"), None);
        assert!(comment_out(&text, |name, _| name == "hba_file").1.is_empty());
    }
}
