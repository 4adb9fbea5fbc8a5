//! PostgreSQL's clock: microseconds since 2000-01-01 00:00 UTC, as WAL records and the replication
//! protocol carry them.

use jiff::Timestamp;
use std::fmt;
use std::str::FromStr;

/// A moment as PostgreSQL writes it ("src/include/datatype/timestamp.h").
///
/// Any `i64` can be held, because damaged WAL can hold any. Text that a person reads is RFC 3339 in UTC;
/// what lies beyond the years that this text can say is shown as the nearest moment that it can.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PgTime(pub i64);

/// Microseconds from the Unix epoch to PostgreSQL's.
const EPOCH_UNIX_MICROS: i64 = 946_684_800_000_000;

impl PgTime {
    /// Microseconds since 2000-01-01 UTC; negative before it.
    pub const fn micros(self) -> i64 {
        self.0
    }

    /// The system clock's now.
    pub fn now() -> PgTime {
        PgTime::from(Timestamp::now())
    }

    /// The same moment, or the nearest that a `Timestamp` can hold.
    pub fn timestamp(self) -> Timestamp {
        let unix = self.0.saturating_add(EPOCH_UNIX_MICROS);
        let nearest = if unix < 0 { Timestamp::MIN } else { Timestamp::MAX };
        Timestamp::from_microsecond(unix).unwrap_or(nearest)
    }

    /// Microseconds that this moment is after `earlier`; negative if it is before. Saturates.
    pub fn micros_since(self, earlier: PgTime) -> i64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl From<Timestamp> for PgTime {
    /// What is finer than a microsecond is dropped.
    fn from(timestamp: Timestamp) -> PgTime {
        PgTime(timestamp.as_microsecond().saturating_sub(EPOCH_UNIX_MICROS))
    }
}

impl From<PgTime> for Timestamp {
    fn from(time: PgTime) -> Timestamp {
        time.timestamp()
    }
}

impl fmt::Display for PgTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.timestamp(), f)
    }
}

impl fmt::Debug for PgTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PgTime {
    type Err = jiff::Error;

    fn from_str(text: &str) -> Result<PgTime, jiff::Error> {
        text.parse::<Timestamp>().map(PgTime::from)
    }
}

impl serde::Serialize for PgTime {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i64(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for PgTime {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<PgTime, D::Error> {
        i64::deserialize(deserializer).map(PgTime)
    }
}

impl<C> minicbor::Encode<C> for PgTime {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.i64(self.0)?.ok()
    }
}

impl<'b, C> minicbor::Decode<'b, C> for PgTime {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<PgTime, minicbor::decode::Error> {
        d.i64().map(PgTime)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Years 1 to 9998 or so: what a Timestamp holds with room to spare.
        #[test]
        fn text_and_cbor_are_inverse(micros in -60_000_000_000_000_000i64..250_000_000_000_000_000) {
            let time = PgTime(micros);
            prop_assert_eq!(PgTime::from(time.timestamp()), time);
            prop_assert_eq!(time.to_string().parse::<PgTime>().unwrap(), time);
            let cbor = minicbor::to_vec(time).unwrap();
            prop_assert_eq!(minicbor::decode::<PgTime>(&cbor).unwrap(), time);
        }

        #[test]
        fn any_number_can_be_shown(micros: i64) {
            let _ = PgTime(micros).to_string();
        }
    }

    #[test]
    fn the_epoch_is_2000() {
        assert_eq!(PgTime(0).to_string(), "2000-01-01T00:00:00Z");
        assert_eq!(PgTime(-1).to_string(), "1999-12-31T23:59:59.999999Z");
        assert_eq!(PgTime(i64::MAX).timestamp(), Timestamp::MAX);
        assert_eq!(PgTime(i64::MIN).timestamp(), Timestamp::MIN);
        assert_eq!(serde_json::to_string(&PgTime(5)).unwrap(), "5");
    }
}
