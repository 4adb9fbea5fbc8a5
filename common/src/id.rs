//! What things are called: one newtype for each kind of identity.

use crate::segment::TimelineId;
use std::fmt;
use std::str::FromStr;

/// Text that is not what it should name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct BadId {
    pub text: String,
    pub expected: &'static str,
}

fn bad(text: &str, expected: &'static str) -> BadId {
    BadId { text: text.to_string(), expected }
}

/// Fixed-width lower-case hex, and nothing else.
pub(crate) fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

pub(crate) fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Bytes of the operating system's random generator.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system has random bytes");
    bytes
}

/// An identity of `$n` bytes, written as lower-case hex; text, serde and CBOR forms.
macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $n:literal, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $n]);

        impl $name {
            pub const fn from_bytes(bytes: [u8; $n]) -> $name {
                $name(bytes)
            }

            pub const fn as_bytes(&self) -> &[u8; $n] {
                &self.0
            }

            /// A fresh one, from the operating system's random generator.
            pub fn random() -> $name {
                $name(random_bytes())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = BadId;

            fn from_str(text: &str) -> Result<$name, BadId> {
                parse_hex(text).map($name).ok_or_else(|| bad(text, $expected))
            }
        }

        text_serde!($name);

        impl<C> minicbor::Encode<C> for $name {
            fn encode<W: minicbor::encode::Write>(
                &self,
                e: &mut minicbor::Encoder<W>,
                _: &mut C,
            ) -> Result<(), minicbor::encode::Error<W::Error>> {
                e.bytes(&self.0)?.ok()
            }
        }

        impl<'b, C> minicbor::Decode<'b, C> for $name {
            fn decode(
                d: &mut minicbor::Decoder<'b>,
                _: &mut C,
            ) -> Result<$name, minicbor::decode::Error> {
                d.bytes()?
                    .try_into()
                    .map($name)
                    .map_err(|_| minicbor::decode::Error::message(concat!("not ", $expected)))
            }
        }
    };
}

macro_rules! text_serde {
    ($name:ident) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<$name, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// The CBOR form of an identity that is text.
macro_rules! text_cbor {
    ($name:ident) => {
        impl<C> minicbor::Encode<C> for $name {
            fn encode<W: minicbor::encode::Write>(
                &self,
                e: &mut minicbor::Encoder<W>,
                _: &mut C,
            ) -> Result<(), minicbor::encode::Error<W::Error>> {
                e.str(&self.to_string())?.ok()
            }
        }

        impl<'b, C> minicbor::Decode<'b, C> for $name {
            fn decode(
                d: &mut minicbor::Decoder<'b>,
                _: &mut C,
            ) -> Result<$name, minicbor::decode::Error> {
                d.str()?.parse().map_err(minicbor::decode::Error::message)
            }
        }
    };
}

hex_id! {
    /// The `<id>` of a sealed object's name: the first eight bytes of its salt.
    ObjectId, 8, "an object id of 16 hex digits"
}
hex_id! {
    /// The life of one data key.
    EpochId, 16, "an epoch id of 32 hex digits"
}
hex_id! {
    /// Tells apart two histories that both became the same timeline.
    BranchId, 4, "a branch id of 8 hex digits"
}

/// A timeline as one history knew it: the folder `wal/<TLI>-<branch>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Branch {
    pub timeline: TimelineId,
    pub id: BranchId,
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}-{}", self.timeline.get(), self.id)
    }
}

impl FromStr for Branch {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Branch, BadId> {
        let parse = || {
            let (timeline, id) = text.split_once('-')?;
            let number = u32::from_str_radix(timeline, 16).ok()?;
            let branch = Branch { timeline: TimelineId::new(number)?, id: id.parse().ok()? };
            (branch.to_string() == text).then_some(branch)
        };
        parse().ok_or_else(|| bad(text, "a branch such as 00000001-3fa9c1d2"))
    }
}

text_serde!(Branch);
text_cbor!(Branch);

/// What PostgreSQL calls a cluster: a number that `initdb` draws and copies keep.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SystemId(u64);

impl SystemId {
    pub const fn new(number: u64) -> SystemId {
        SystemId(number)
    }

    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for SystemId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<SystemId, BadId> {
        match text.parse() {
            Ok(number) if SystemId(number).to_string() == text => Ok(SystemId(number)),
            _ => Err(bad(text, "a system identifier such as 7312345678901234567")),
        }
    }
}

text_serde!(SystemId);

impl<C> minicbor::Encode<C> for SystemId {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.u64(self.0)?.ok()
    }
}

impl<'b, C> minicbor::Decode<'b, C> for SystemId {
    fn decode(
        d: &mut minicbor::Decoder<'b>,
        _: &mut C,
    ) -> Result<SystemId, minicbor::decode::Error> {
        d.u64().map(SystemId)
    }
}

/// A snapshot: the second at which it began, in UTC, and four random bytes. Sorts by time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SnapshotId {
    began: i64,
    random: [u8; 4],
}

impl SnapshotId {
    /// `began` loses its fraction of a second.
    pub fn new(began: jiff::Timestamp, random: [u8; 4]) -> SnapshotId {
        SnapshotId { began: began.as_second(), random }
    }

    /// The second at which it began.
    pub fn began(&self) -> jiff::Timestamp {
        jiff::Timestamp::from_second(self.began).expect("made from a timestamp")
    }
}

const SNAPSHOT_TIME: &str = "%Y%m%dT%H%M%SZ";

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-", self.began().strftime(SNAPSHOT_TIME))?;
        write_hex(f, &self.random)
    }
}

impl FromStr for SnapshotId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<SnapshotId, BadId> {
        let parse = || {
            let (time, random) = text.split_once('-')?;
            let began = jiff::civil::DateTime::strptime(SNAPSHOT_TIME, time).ok()?;
            let began = began.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
            let id = SnapshotId::new(began, parse_hex(random)?);
            (id.to_string() == text).then_some(id)
        };
        parse().ok_or_else(|| bad(text, "a snapshot id such as 20261122T020000Z-1f2e3d4c"))
    }
}

text_serde!(SnapshotId);
text_cbor!(SnapshotId);

/// A name that an operator gives: 1 to 63 of `a-z A-Z 0-9 _ . -`, not beginning with `.` or `-`.
fn is_plain_name(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && !text.starts_with(['.', '-'])
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

macro_rules! plain_name {
    ($(#[$doc:meta])* $name:ident, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = BadId;

            fn from_str(text: &str) -> Result<$name, BadId> {
                match is_plain_name(text) {
                    true => Ok($name(text.to_string())),
                    false => Err(bad(text, $expected)),
                }
            }
        }

        text_serde!($name);
        text_cbor!($name);
    };
}

plain_name! {
    /// What the config calls a location.
    LocationName, "a location name (1 to 63 letters, digits, '_', '.' or '-')"
}
plain_name! {
    /// What the config calls the cluster.
    ClusterName, "a cluster name (1 to 63 letters, digits, '_', '.' or '-')"
}
plain_name! {
    /// What an agent calls itself: its host's name unless the config has another.
    AgentName, "an agent name (1 to 63 letters, digits, '_', '.' or '-')"
}

impl AgentName {
    /// The agent's replication slot: `backstay_<name>`, with what PostgreSQL does not allow made `_`.
    pub fn slot(&self) -> String {
        let safe = |c: char| match c.to_ascii_lowercase() {
            c if c.is_ascii_lowercase() || c.is_ascii_digit() => c,
            _ => '_',
        };
        let mut slot: String = "backstay_".chars().chain(self.0.chars().map(safe)).collect();
        slot.truncate(63);
        slot
    }
}

/// Who adds to a ledger: an agent, by the chain that one state directory of it began.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LedgerWriter {
    pub agent: AgentName,
    pub chain: ObjectId,
}

impl fmt::Display for LedgerWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.agent, self.chain)
    }
}

impl FromStr for LedgerWriter {
    type Err = BadId;

    fn from_str(text: &str) -> Result<LedgerWriter, BadId> {
        let parse = || {
            let (agent, chain) = text.rsplit_once('-')?;
            Some(LedgerWriter { agent: agent.parse().ok()?, chain: chain.parse().ok()? })
        };
        parse().ok_or_else(|| bad(text, "a ledger's writer such as db1-0011223344556677"))
    }
}

text_serde!(LedgerWriter);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn inverse<T: FromStr<Err = BadId> + fmt::Display + PartialEq + fmt::Debug>(id: T) {
        assert_eq!(id.to_string().parse::<T>(), Ok(id));
    }

    proptest! {
        #[test]
        fn text_is_inverse(bytes: [u8; 16], timeline in 1u32.., system: u64, second in 0i64..4_000_000_000) {
            let short = |n: usize| -> [u8; 4] { bytes[n..n + 4].try_into().unwrap() };
            inverse(EpochId::from_bytes(bytes));
            inverse(ObjectId::from_bytes(bytes[..8].try_into().unwrap()));
            inverse(SystemId::new(system));
            let chain = ObjectId::from_bytes(bytes[..8].try_into().unwrap());
            inverse(LedgerWriter { agent: "db-1".parse().unwrap(), chain });
            inverse(Branch {
                timeline: TimelineId::new(timeline).unwrap(),
                id: BranchId::from_bytes(short(0)),
            });
            inverse(SnapshotId::new(jiff::Timestamp::from_second(second).unwrap(), short(4)));
        }

        #[test]
        fn names_are_safe_in_paths(text: String) {
            if let Ok(name) = text.parse::<LocationName>() {
                prop_assert!(!name.as_str().contains(['/', '\\', '\0']) && name.as_str() != "..");
            }
        }
    }

    #[test]
    fn other_spellings_are_refused() {
        assert!("0".repeat(31).parse::<EpochId>().is_err());
        assert!("A".repeat(16).parse::<ObjectId>().is_err());
        assert!("0000000a-01020304".parse::<Branch>().is_err());
        assert!("00000000-01020304".parse::<Branch>().is_err());
        assert!("20261322T020000Z-01020304".parse::<SnapshotId>().is_err());
        assert!("../x".parse::<ClusterName>().is_err());
        assert!("007".parse::<SystemId>().is_err());
    }

    #[test]
    fn slot_names_are_postgres_names() {
        let agent: AgentName = "DB-1.example".parse().unwrap();
        assert_eq!(agent.slot(), "backstay_db_1_example");
    }
}
