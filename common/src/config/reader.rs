//! Reads a TOML tree key by key and collects every fault with its line.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Faults as (byte offset in the file, text).
type Faults = Rc<RefCell<Vec<(usize, String)>>>;

/// One table of the file. What nobody has asked for when it is dropped is a fault.
pub(super) struct Reader<'t> {
    text: &'t str,
    /// Where it stands, for messages: `[postgres] `.
    place: String,
    at: usize,
    table: DeTable<'t>,
    asked: Vec<(&'static str, usize)>,
    faults: Faults,
}

impl<'t> Reader<'t> {
    pub fn parse(text: &'t str) -> Result<Reader<'t>, Vec<String>> {
        let table = DeTable::parse(text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(text, span.start));
            vec![format!("line {line}: {}", error.message())]
        })?;
        Ok(Reader {
            text,
            place: String::new(),
            at: 0,
            table: table.into_inner(),
            asked: Vec::new(),
            faults: Faults::default(),
        })
    }

    /// The faults of this table and all tables taken from it, in the order of lines.
    pub fn finish(self) -> Result<(), Vec<String>> {
        let (text, faults) = (self.text, self.faults.clone());
        drop(self);
        let mut faults = faults.take();
        faults.sort();
        match faults.is_empty() {
            true => Ok(()),
            false => Err(faults
                .iter()
                .map(|(at, fault)| format!("line {}: {fault}", line_of(text, *at)))
                .collect()),
        }
    }

    /// Reports a fault of the value of `key`.
    pub fn fault(&mut self, key: &str, reason: &str, remedy: &str) {
        let at = self.asked.iter().find(|(asked, _)| *asked == key).map_or(self.at, |(_, at)| *at);
        self.fault_at(at, format!("{}{key}: {reason}; {remedy}", self.place));
    }

    fn fault_at(&self, at: usize, fault: String) {
        self.faults.borrow_mut().push((at, fault));
    }

    fn take(&mut self, key: &'static str) -> Option<Spanned<DeValue<'t>>> {
        let value = self.table.remove(key);
        self.asked.push((key, value.as_ref().map_or(self.at, |v| v.span().start)));
        value
    }

    fn typed<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&DeValue<'t>) -> Option<T>,
    ) -> Option<T> {
        let value = self.take(key)?;
        let read = read(value.get_ref());
        if read.is_none() {
            let reason = format!("a {} that is no {expected}", value.get_ref().type_str());
            self.fault(key, &reason, &format!("write {expected}"));
        }
        read
    }

    pub fn string(&mut self, key: &'static str) -> Option<String> {
        self.typed(key, "text in quotes", |value| value.as_str().map(str::to_string))
    }

    pub fn boolean(&mut self, key: &'static str) -> Option<bool> {
        self.typed(key, "true or false", DeValue::as_bool)
    }

    pub fn integer(
        &mut self,
        key: &'static str,
        range: std::ops::RangeInclusive<i64>,
    ) -> Option<i64> {
        let expected = format!("whole number from {} to {}", range.start(), range.end());
        self.typed(key, &expected, |value| {
            let integer = value.as_integer()?;
            let number = i64::from_str_radix(integer.as_str(), integer.radix()).ok()?;
            range.contains(&number).then_some(number)
        })
    }

    pub fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        let path = PathBuf::from(self.string(key)?);
        if !path.is_absolute() {
            self.fault(key, "not an absolute path", "begin it with /");
        }
        Some(path)
    }

    /// Text that a type of ours reads.
    pub fn parsed<T: FromStr<Err: std::fmt::Display>>(
        &mut self,
        key: &'static str,
        remedy: &str,
    ) -> Option<T> {
        match self.string(key)?.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.fault(key, &error.to_string(), remedy);
                None
            }
        }
    }

    pub fn required<T: FromStr<Err: std::fmt::Display>>(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> Option<T> {
        if !self.table.contains_key(key) {
            self.asked.push((key, self.at));
            self.fault(key, "missing", &format!("add: {example}"));
            return None;
        }
        self.parsed(key, &format!("write for example {example}"))
    }

    /// One of `words`.
    pub fn word<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> Option<T> {
        let text = self.string(key)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let list: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.fault(
                key,
                &format!("{text:?} is unknown"),
                &format!("choose from: {}", list.join(", ")),
            );
        }
        found
    }

    /// A duration such as "5s", "30d".
    pub fn duration(&mut self, key: &'static str) -> Option<Duration> {
        let text = self.string(key)?;
        match humantime::parse_duration(&text) {
            Ok(duration) => Some(duration),
            Err(error) => {
                self.fault(
                    key,
                    &format!("{text:?}: {error}"),
                    "write for example \"5s\" or \"7d\"",
                );
                None
            }
        }
    }

    /// A size such as "16GiB".
    pub fn bytes(&mut self, key: &'static str) -> Option<u64> {
        let text = self.string(key)?;
        let size = parse_bytes(&text);
        if size.is_none() {
            self.fault(
                key,
                &format!("{text:?} is not a size"),
                "write for example \"512MiB\" or \"16GiB\"",
            );
        }
        size
    }

    /// The table `key`; an empty one if the file has none.
    pub fn table(&mut self, key: &'static str) -> Reader<'t> {
        let (at, table) = match self.take(key) {
            None => (self.at, DeTable::new()),
            Some(value) => (value.span().start, self.expect_table(key, value.into_inner())),
        };
        self.child(format!("[{key}] "), at, table)
    }

    /// All tables `[[key]]`; none is a fault.
    pub fn tables(&mut self, key: &'static str, example: &str) -> Vec<Reader<'t>> {
        let Some(value) = self.take(key) else {
            self.fault(key, "there is none", &format!("add at least one:\n{example}"));
            return Vec::new();
        };
        let DeValue::Array(values) = value.into_inner() else {
            self.fault(
                key,
                "not a list of tables",
                &format!("write it in double brackets: [[{key}]]"),
            );
            return Vec::new();
        };
        let mut readers = Vec::new();
        for value in values {
            let at = value.span().start;
            let table = self.expect_table(key, value.into_inner());
            readers.push(self.child(format!("[[{key}]] "), at, table));
        }
        readers
    }

    fn expect_table(&mut self, key: &'static str, value: DeValue<'t>) -> DeTable<'t> {
        match value {
            DeValue::Table(table) => table,
            other => {
                let reason = format!("a {} and no table", other.type_str());
                self.fault(key, &reason, &format!("begin it with [{key}]"));
                DeTable::new()
            }
        }
    }

    fn child(&self, place: String, at: usize, table: DeTable<'t>) -> Reader<'t> {
        let faults = self.faults.clone();
        Reader { text: self.text, place, at, table, asked: Vec::new(), faults }
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let known: Vec<&str> = self.asked.iter().map(|(key, _)| *key).collect();
        for key in self.table.keys() {
            let fault = format!(
                "{}{}: unknown key; remove it, or correct it to one of: {}",
                self.place,
                key.get_ref(),
                known.join(", ")
            );
            self.fault_at(key.span().start, fault);
        }
    }
}

/// `4096`, `512MiB`, `16 GiB`, `1GB`.
fn parse_bytes(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[end..].trim() {
        "" | "B" => 1,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    text[..end].parse::<u64>().ok()?.checked_mul(unit)
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|&&b| b == b'\n').count() + 1
}
