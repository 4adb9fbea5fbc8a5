//! The two spellings of a connection string ("src/interfaces/libpq/fe-connect.c").
//!
//! A value may be a password, so errors say where something is wrong and not what was there.

use super::{Values, keyword, refuse};
use crate::{Error, Result};
use std::iter::Peekable;
use std::str::CharIndices;
use zeroize::Zeroizing;

/// The keywords and values of either spelling; where one is repeated, the last holds.
pub(super) fn parse(text: &str) -> Result<Values> {
    match ["postgres://", "postgresql://"].iter().find_map(|scheme| text.strip_prefix(scheme)) {
        Some(rest) => parse_uri(rest),
        None => parse_pairs(text),
    }
}

fn parse_pairs(text: &str) -> Result<Values> {
    let mut values = Values::new();
    let mut rest = Pairs { text, chars: text.char_indices().peekable() };
    while let Some((name, value)) = rest.pair()? {
        values.insert(keyword(name)?, value);
    }
    Ok(values)
}

struct Pairs<'a> {
    text: &'a str,
    chars: Peekable<CharIndices<'a>>,
}

impl<'a> Pairs<'a> {
    fn pair(&mut self) -> Result<Option<(&'a str, Zeroizing<String>)>> {
        self.skip_space();
        let Some(&(start, _)) = self.chars.peek() else { return Ok(None) };
        while self.chars.next_if(|(_, c)| *c != '=' && !c.is_ascii_whitespace()).is_some() {}
        let end = self.position();
        self.skip_space();
        if self.chars.next_if(|(_, c)| *c == '=').is_none() || start == end {
            return Err(refuse(format_args!("expected keyword=value at character {}", start + 1))
                .remedy("put a value with spaces in single quotes"));
        }
        self.skip_space();
        let value = match self.chars.next_if(|(_, c)| *c == '\'') {
            Some((at, _)) => self.quoted(at)?,
            None => self.plain(),
        };
        Ok(Some((&self.text[start..end], value)))
    }

    fn position(&mut self) -> usize {
        self.chars.peek().map_or(self.text.len(), |(at, _)| *at)
    }

    fn skip_space(&mut self) {
        while self.chars.next_if(|(_, c)| c.is_ascii_whitespace()).is_some() {}
    }

    fn plain(&mut self) -> Zeroizing<String> {
        let mut value = self.empty_value();
        while let Some((_, c)) = self.chars.next_if(|(_, c)| !c.is_ascii_whitespace()) {
            match c {
                '\\' => value.extend(self.chars.next().map(|(_, escaped)| escaped)),
                _ => value.push(c),
            }
        }
        value
    }

    fn quoted(&mut self, start: usize) -> Result<Zeroizing<String>> {
        let mut value = self.empty_value();
        while let Some((_, c)) = self.chars.next() {
            match c {
                '\'' => return Ok(value),
                '\\' => value.extend(self.chars.next().map(|(_, escaped)| escaped)),
                _ => value.push(c),
            }
        }
        Err(refuse(format_args!("the quote at character {} is not closed", start + 1)))
    }

    /// With room for the longest value, so that no copy of it is left behind by growing.
    fn empty_value(&self) -> Zeroizing<String> {
        Zeroizing::new(String::with_capacity(self.text.len()))
    }
}

/// `[user[:password]@][host[:port][,...]][/dbname][?keyword=value[&...]]`
fn parse_uri(rest: &str) -> Result<Values> {
    let mut values = Values::new();
    let (rest, parameters) = cut(rest, '?');
    let (authority, dbname) = cut(rest, '/');
    let hosts = match authority.split_once('@') {
        Some((who, hosts)) => {
            let (user, password) = cut(who, ':');
            values.insert("user", decode(user)?);
            if let Some(password) = password {
                values.insert("password", decode(password)?);
            }
            hosts
        }
        None => authority,
    };
    parse_hosts(hosts, &mut values)?;
    if let Some(dbname) = dbname {
        values.insert("dbname", decode(dbname)?);
    }
    for parameter in parameters.iter().flat_map(|p| p.split('&')).filter(|p| !p.is_empty()) {
        insert_parameter(parameter, &mut values)?;
    }
    // A part that is there and empty leaves the environment's value in force, as in libpq.
    values.retain(|_, value| !value.is_empty());
    Ok(values)
}

fn cut(text: &str, at: char) -> (&str, Option<&str>) {
    match text.split_once(at) {
        Some((before, after)) => (before, Some(after)),
        None => (text, None),
    }
}

fn parse_hosts(hosts: &str, values: &mut Values) -> Result<()> {
    let mut names = Vec::new();
    let mut ports = Vec::new();
    for host in hosts.split(',') {
        let (name, port) = match host.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once(']').ok_or_else(|| {
                    refuse(format_args!("host {host:?}: the bracket is not closed"))
                })?;
                let port = match port.strip_prefix(':') {
                    Some(port) => port,
                    None if port.is_empty() => "",
                    None => return Err(refuse(format_args!("host {host:?}: expected : after ]"))),
                };
                (address, port)
            }
            None => host.split_once(':').unwrap_or((host, "")),
        };
        names.push(decode(name)?);
        ports.push(port);
    }
    let join = |parts: Vec<&str>| match parts.iter().all(|part| part.is_empty()) {
        true => Zeroizing::default(),
        false => Zeroizing::new(parts.join(",")),
    };
    values.insert("host", join(names.iter().map(|name| name.as_str()).collect()));
    values.insert("port", join(ports));
    Ok(())
}

fn insert_parameter(parameter: &str, values: &mut Values) -> Result<()> {
    let malformed = || refuse("a parameter after ? is not keyword=value");
    let (name, value) = parameter.split_once('=').ok_or_else(malformed)?;
    if value.contains('=') {
        return Err(malformed().remedy("write = inside a value as %3D"));
    }
    let (name, value) = (decode(name)?, decode(value)?);
    // JDBC's spelling, which libpq takes too.
    match (name.as_str(), value.as_str()) {
        ("ssl", "true") => values.insert("sslmode", Zeroizing::new("require".to_string())),
        (name, _) => values.insert(keyword(name)?, value),
    };
    Ok(())
}

/// Undoes %XX.
fn decode(text: &str) -> Result<Zeroizing<String>> {
    let bad = || -> Error {
        refuse("a % in the URI is not followed by two hex digits of valid text")
            .remedy("write % inside a value as %25")
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        match (first, after) {
            (b'%', [high, low, after @ ..]) => {
                let digit = |b: u8| (b as char).to_digit(16).ok_or_else(bad);
                let byte = (digit(*high)? << 4 | digit(*low)?) as u8;
                if byte == 0 {
                    return Err(refuse("%00 cannot be part of a value"));
                }
                bytes.push(byte);
                rest = after;
            }
            (b'%', _) => return Err(bad()),
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::str::from_utf8(&bytes).map(|text| Zeroizing::new(text.to_string())).map_err(|_| bad())
}
