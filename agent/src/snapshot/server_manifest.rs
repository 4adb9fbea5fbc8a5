//! The server's backup manifest, compared with what was streamed ("src/backend/backup/backup_manifest.c").
//!
//! Every file's size and CRC-32C is noted as it streams, and must then be in the manifest, and nothing else may be. So a byte
//! that was lost or changed between the server and the agent is found, and the snapshot fails. The manifest is
//! read as it comes: memory is that of what was noted, some 50 bytes a file.

use backstay_common::id::SystemId;
use backstay_common::lsn::Lsn;
use backstay_common::{Error, Kind, Result};
use bytes::{Buf, Bytes};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt;
use std::io::{self, BufReader, Read};
use tokio::sync::mpsc;

/// The longest line of a manifest: it says one file.
const LINE_BYTES_MAX: usize = 64 << 10;
const VERSIONS: std::ops::RangeInclusive<u64> = 1..=2;

/// What was streamed, by a hash of its path.
#[derive(Debug, Default)]
pub struct Streamed {
    files: HashMap<[u8; 16], (u64, u32)>,
}

/// What the backup is, as known from elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    pub system: SystemId,
    pub start: Lsn,
    pub stop: Lsn,
}

impl Streamed {
    /// Notes a file; false if there is one of that path already.
    pub fn note(&mut self, path: &str, bytes: u64, crc32c: u32) -> bool {
        self.files.insert(key(path), (bytes, crc32c)).is_none()
    }

    fn compare(&mut self, file: &ManifestFile) -> Result<(), String> {
        let path = file.path()?;
        let crc = file.crc32c().ok_or_else(|| format!("{path} has no CRC32C in it"))?;
        match self.files.remove(&key(&path)) {
            None => Err(format!("{path} is in it, and was not streamed")),
            Some((bytes, _)) if bytes != file.size => {
                Err(format!("{path} has {} bytes in it, and {bytes} were streamed", file.size))
            }
            Some((_, streamed)) if streamed != crc => Err(format!(
                "{path} has the CRC-32C {crc:08x} in it, and {streamed:08x} as streamed"
            )),
            Some(_) => Ok(()),
        }
    }
}

fn key(path: &str) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(path.as_bytes()).into();
    *digest.first_chunk().expect("a SHA-256 has more bytes")
}

/// What a manifest says of the whole backup.
#[derive(Debug)]
pub struct Said {
    /// From version 2 on.
    system: Option<u64>,
    ranges: Vec<WalRange>,
}

impl Said {
    /// Any difference is of [`Kind::Corrupt`].
    pub fn check(&self, expected: &Expected) -> Result<()> {
        if let Some(system) = self.system.filter(|system| *system != expected.system.get()) {
            return Err(differs(&format!("it is of system {system}")));
        }
        let (start, stop) = (
            self.ranges.iter().map(|range| range.start).min(),
            self.ranges.iter().map(|range| range.end).max(),
        );
        if (start, stop) != (Some(expected.start), Some(expected.stop)) {
            let reason = format!(
                "it needs the WAL {:?}, and the backup went from {} to {}",
                self.ranges, expected.start, expected.stop
            );
            return Err(differs(&reason));
        }
        Ok(())
    }
}

/// Reads a manifest to its end, and compares its files with what was streamed. Any difference is of [`Kind::Corrupt`].
/// Blocks.
pub fn compare(manifest: impl Read, streamed: Streamed) -> Result<Said> {
    let mut reader = Hashing::new(BufReader::with_capacity(64 << 10, manifest));
    let mut found = Found { streamed, ..Found::default() };
    let parsed = {
        let mut json = serde_json::Deserializer::from_reader(&mut reader);
        ManifestSeed(&mut found).deserialize(&mut json).and_then(|()| json.end())
    };
    // What differs says more than where reading ended for it.
    match (found.difference.take(), parsed) {
        (Some(difference), _) => return Err(differs(&difference)),
        (None, Err(error)) => return Err(differs(&format!("it cannot be read: {error}"))),
        (None, Ok(())) => {}
    }
    found.finish(&reader.digest()).map_err(|reason| differs(&reason))
}

fn differs(reason: &str) -> Error {
    Error::new(Kind::Corrupt, format!("the server's backup manifest does not fit: {reason}"))
        .remedy("something between the server's disk and the agent changes bytes; take another snapshot")
}

/// What a manifest has said so far.
#[derive(Debug, Default)]
struct Found {
    streamed: Streamed,
    version: Option<u64>,
    system: Option<u64>,
    ranges: Vec<WalRange>,
    checksum: Option<String>,
    difference: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ManifestFile {
    #[serde(rename = "Path")]
    path: Option<String>,
    /// In hexadecimal, where it is not UTF-8.
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct WalRange {
    #[serde(rename = "Start-LSN", deserialize_with = "lsn")]
    start: Lsn,
    #[serde(rename = "End-LSN", deserialize_with = "lsn")]
    end: Lsn,
}

/// As PostgreSQL writes positions: `1A/4000028`.
fn lsn<'de, D: serde::Deserializer<'de>>(json: D) -> Result<Lsn, D::Error> {
    let text = String::deserialize(json)?;
    text.parse().map_err(|_| D::Error::custom(format!("{text:?} is no position")))
}

impl ManifestFile {
    fn path(&self) -> Result<String, String> {
        match (&self.path, &self.encoded_path) {
            (Some(path), None) => Ok(path.clone()),
            (None, Some(encoded)) => {
                let path = unhex(encoded).and_then(|bytes| String::from_utf8(bytes).ok());
                path.ok_or_else(|| format!("the path {encoded} in it is not UTF-8"))
            }
            _ => Err("a file in it has no path, or two".into()),
        }
    }

    /// The server writes the number's bytes as it has them in memory.
    fn crc32c(&self) -> Option<u32> {
        let is_ours = self.algorithm.as_deref() == Some("CRC32C");
        let bytes = unhex(self.checksum.as_ref().filter(|_| is_ours)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }
}

impl Found {
    fn finish(self, digest: &[u8; 32]) -> Result<Said, String> {
        match self.version {
            Some(version) if VERSIONS.contains(&version) => {}
            Some(version) => return Err(format!("it has version {version}, not 1 or 2")),
            None => return Err("it has no version".into()),
        }
        let checksum = self.checksum.as_deref().and_then(unhex);
        if checksum.as_deref() != Some(&digest[..]) {
            return Err("its own checksum is wrong".into());
        }
        match self.streamed.files.len() {
            0 => Ok(Said { system: self.system, ranges: self.ranges }),
            files => Err(format!("{files} files were streamed that are not in it")),
        }
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| (byte as char).to_digit(16);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let byte = |[high, low]: &[u8; 2]| Some((digit(*high)? << 4 | digit(*low)?) as u8);
    pairs.iter().map(byte).collect::<Option<Vec<u8>>>().filter(|_| rest.is_empty())
}

struct ManifestSeed<'f>(&'f mut Found);

impl<'de> DeserializeSeed<'de> for ManifestSeed<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ManifestSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a backup manifest")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "PostgreSQL-Backup-Manifest-Version" => self.0.version = Some(map.next_value()?),
                "System-Identifier" => self.0.system = Some(map.next_value()?),
                "Files" => map.next_value_seed(FilesSeed(self.0))?,
                "WAL-Ranges" => self.0.ranges = map.next_value()?,
                "Manifest-Checksum" => self.0.checksum = Some(map.next_value()?),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// The files, one after the other: there may be millions.
struct FilesSeed<'f>(&'f mut Found);

impl<'de> DeserializeSeed<'de> for FilesSeed<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for FilesSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of files")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut files: A) -> Result<(), A::Error> {
        while let Some(file) = files.next_element::<ManifestFile>()? {
            if let Err(difference) = self.0.streamed.compare(&file) {
                self.0.difference = Some(difference.clone());
                return Err(A::Error::custom(difference));
            }
        }
        Ok(())
    }
}

/// Hashes what is read, but for the last line, which holds the hash.
struct Hashing<R> {
    input: R,
    hash: Sha256,
    /// The last whole line, which may be the last of all.
    last: Vec<u8>,
    line: Vec<u8>,
}

impl<R: Read> Hashing<R> {
    fn new(input: R) -> Hashing<R> {
        Hashing { input, hash: Sha256::new(), last: Vec::new(), line: Vec::new() }
    }

    fn digest(mut self) -> [u8; 32] {
        // A last line without an end is the last all the same.
        if !self.line.is_empty() {
            self.hash.update(&self.last);
        }
        self.hash.finalize().into()
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        for part in buffer[..read].split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() > LINE_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without an end"));
            }
            if part.ends_with(b"\n") {
                self.hash.update(&self.last);
                self.last = std::mem::take(&mut self.line);
            }
        }
        Ok(read)
    }
}

/// Reads what comes through a channel; it ends when the sender is dropped.
#[derive(Debug)]
pub struct ChannelReader {
    parts: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl ChannelReader {
    pub fn new(parts: mpsc::Receiver<Bytes>) -> ChannelReader {
        ChannelReader { parts, current: Bytes::new() }
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.parts.blocking_recv() {
                Some(part) => self.current = part,
                None => return Ok(0),
            }
        }
        let taken = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..taken]);
        Ok(taken)
    }
}

#[cfg(test)]
mod tests;
