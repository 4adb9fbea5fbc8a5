//! Encoded metadata: CBOR maps with numbered fields, and the rule for fields that a reader does not know.
//!
//! A field below [`CRITICAL_BELOW`] that a reader does not know makes it refuse the whole; a field from
//! there on may be skipped. So a later version can say "you must understand this" and "you may not care".
//!
//! The rule holds for maps that stand for themselves. In maps and arrays inside another, unknown fields are skipped:
//! what must be understood there is announced by a field of the outer map.

use crate::{Error, Kind, Result};
use minicbor::{Decode, Decoder, Encode};

/// Unknown fields of a map that stands for itself with a number below this are refused, others are skipped.
pub const CRITICAL_BELOW: u64 = 64;

/// A map whose fields from 0 up to and without `KNOWN` this version understands.
pub trait Fields {
    const KNOWN: u64;
    /// What it is, for errors: "manifest root".
    const WHAT: &'static str;
}

/// The bytes of one map.
pub fn encode<T: Encode<()>>(value: &T) -> Vec<u8> {
    minicbor::to_vec(value).expect("writing to memory cannot fail")
}

/// Reads one map that fills `bytes`. Damage is [`Kind::Corrupt`]; an unknown critical field says that a
/// newer version is needed.
pub fn decode<'b, T: Decode<'b, ()> + Fields>(bytes: &'b [u8]) -> Result<T> {
    let corrupt = |e: minicbor::decode::Error| {
        Error::new(Kind::Corrupt, format!("{} cannot be read: {e}", T::WHAT))
    };
    if let Some(field) = unknown_critical(bytes, T::KNOWN).map_err(corrupt)? {
        return Err(Error::new(
            Kind::Config,
            format!("{} has field {field}, which this version does not know", T::WHAT),
        )
        .remedy("use the version of Backstay that wrote it, or a newer one"));
    }
    minicbor::decode(bytes).map_err(corrupt)
}

fn unknown_critical(
    bytes: &[u8],
    known: u64,
) -> std::result::Result<Option<u64>, minicbor::decode::Error> {
    let mut decoder = Decoder::new(bytes);
    let fields = decoder
        .map()?
        .ok_or_else(|| minicbor::decode::Error::message("a map of unstated length"))?;
    let mut before = None;
    for _ in 0..fields {
        let field = decoder.u64()?;
        if before.replace(field).is_some_and(|before| before >= field) {
            return Err(minicbor::decode::Error::message("fields out of order, or one twice"));
        }
        if (known..CRITICAL_BELOW).contains(&field) {
            return Ok(Some(field));
        }
        decoder.skip()?;
    }
    match decoder.position() == bytes.len() {
        true => Ok(None),
        false => Err(minicbor::decode::Error::message("bytes after its end")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Encode, Decode, Debug, PartialEq)]
    #[cbor(map)]
    struct Old {
        #[n(0)]
        a: u32,
    }

    impl Fields for Old {
        const KNOWN: u64 = 1;
        const WHAT: &'static str = "test map";
    }

    #[derive(Encode)]
    #[cbor(map)]
    struct Newer {
        #[n(0)]
        a: u32,
        #[n(1)]
        critical: Option<u32>,
        #[n(64)]
        extra: Option<u32>,
    }

    #[test]
    fn unknown_fields_are_refused_or_skipped_by_number() {
        let skipped = encode(&Newer { a: 1, critical: None, extra: Some(2) });
        assert_eq!(decode::<Old>(&skipped).unwrap(), Old { a: 1 });
        let refused = encode(&Newer { a: 1, critical: Some(2), extra: None });
        assert_eq!(decode::<Old>(&refused).unwrap_err().kind(), Kind::Config);
    }

    #[test]
    fn damage_is_corrupt() {
        let mut bytes = encode(&Old { a: 1 });
        bytes.push(0);
        assert_eq!(decode::<Old>(&bytes).unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(decode::<Old>(&[]).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn a_field_is_there_once() {
        for fields in [&[0, 1, 0, 2][..], &[0x18, 64, 1, 0, 2]] {
            let bytes = [&[0xA2], fields].concat();
            assert_eq!(decode::<Old>(&bytes).unwrap_err().kind(), Kind::Corrupt, "{bytes:x?}");
        }
    }
}
