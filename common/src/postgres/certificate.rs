//! What TLS alone does not tell of a certificate: which hash signed it, and when it is valid.
//!
//! A walk over the few DER elements needed (RFC 5280, section 4.1), bounds checked at each step.

use crate::pgtime::PgTime;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

const SEQUENCE: u8 = 0x30;
const OBJECT_ID: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const CONTEXT_0: u8 = 0xA0;

/// The hash of a server's certificate that binds a login to the TLS connection: "tls-server-end-point"
/// (RFC 5929, section 4.1), by the hash of its signature, SHA-256 in place of MD5 and SHA-1.
///
/// None if the signature has no single hash (Ed25519); PostgreSQL offers no binding then.
pub(super) fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    Some(match signature_hash(certificate)? {
        Hash::Sha224 => Sha224::digest(certificate).to_vec(),
        Hash::Sha256 => Sha256::digest(certificate).to_vec(),
        Hash::Sha384 => Sha384::digest(certificate).to_vec(),
        Hash::Sha512 => Sha512::digest(certificate).to_vec(),
    })
}

/// True if the certificate is valid at `now`; false too if it cannot be read.
pub(super) fn is_valid_at(certificate: &[u8], now: PgTime) -> bool {
    validity(certificate).is_some_and(|(from, to)| from <= now && now <= to)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hash {
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

fn signature_hash(certificate: &[u8]) -> Option<Hash> {
    let mut fields = Der(Der(certificate).expect(SEQUENCE)?);
    fields.expect(SEQUENCE)?; // tbsCertificate
    let mut algorithm = Der(fields.expect(SEQUENCE)?);
    match algorithm.expect(OBJECT_ID)? {
        // RSASSA-PSS names its hash in parameters; without them it is SHA-1.
        [0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 1, 1, 10] => {
            let mut parameters = Der(algorithm.expect(SEQUENCE)?);
            let Some(hash) = parameters.expect(CONTEXT_0) else { return Some(Hash::Sha256) };
            match Der(Der(hash).expect(SEQUENCE)?).expect(OBJECT_ID)? {
                [0x2B, 0x0E, 3, 2, 26] => Some(Hash::Sha256), // SHA-1
                [0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, last] => match last {
                    1 => Some(Hash::Sha256),
                    2 => Some(Hash::Sha384),
                    3 => Some(Hash::Sha512),
                    4 => Some(Hash::Sha224),
                    _ => None,
                },
                _ => None,
            }
        }
        // PKCS #1: MD5, SHA-1, SHA-256, SHA-384, SHA-512, SHA-224 with RSA.
        [0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 1, 1, last] => match last {
            4 | 5 | 11 => Some(Hash::Sha256),
            12 => Some(Hash::Sha384),
            13 => Some(Hash::Sha512),
            14 => Some(Hash::Sha224),
            _ => None,
        },
        [0x2A, 0x86, 0x48, 0xCE, 0x3D, 4, 1] => Some(Hash::Sha256), // ECDSA with SHA-1
        [0x2A, 0x86, 0x48, 0xCE, 0x3D, 4, 3, last] => match last {
            1 => Some(Hash::Sha224),
            2 => Some(Hash::Sha256),
            3 => Some(Hash::Sha384),
            4 => Some(Hash::Sha512),
            _ => None,
        },
        _ => None,
    }
}

fn validity(certificate: &[u8]) -> Option<(PgTime, PgTime)> {
    let mut fields = Der(Der(Der(certificate).expect(SEQUENCE)?).expect(SEQUENCE)?);
    fields.expect(CONTEXT_0); // version, left out in version 1
    fields.next()?; // serial number
    fields.expect(SEQUENCE)?; // signature
    fields.expect(SEQUENCE)?; // issuer
    let mut times = Der(fields.expect(SEQUENCE)?);
    Some((time(times.next()?)?, time(times.next()?)?))
}

fn time((tag, text): (u8, &[u8])) -> Option<PgTime> {
    let text = std::str::from_utf8(text).ok()?;
    let text = match tag {
        UTC_TIME if text.get(..2)?.parse::<u8>().ok()? < 50 => format!("20{text}"),
        UTC_TIME => format!("19{text}"),
        GENERALIZED_TIME => text.to_string(),
        _ => return None,
    };
    let time = jiff::civil::DateTime::strptime("%Y%m%d%H%M%SZ", text).ok()?;
    Some(time.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().into())
}

/// Elements that follow each other.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The next element's tag and content.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0..=0x7F => (usize::from(first), rest),
            0x81..=0x84 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7F))?;
                (bytes.iter().fold(0usize, |length, b| length << 8 | usize::from(*b)), rest)
            }
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, content))
    }

    /// The next element's content if it has this tag; else nothing is taken.
    fn expect(&mut self, tag: u8) -> Option<&'a [u8]> {
        let mut ahead = Der(self.0);
        let (found, content) = ahead.next()?;
        (found == tag).then(|| {
            self.0 = ahead.0;
            content
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        let length = content.len() as u16;
        let mut bytes = vec![tag, 0x82, (length >> 8) as u8, length as u8];
        bytes.extend(content);
        bytes
    }

    fn certificate(algorithm: &[u8], times: [(u8, &str); 2]) -> Vec<u8> {
        let times = times.map(|(tag, text)| element(tag, &[text.as_bytes()]));
        let body = element(
            SEQUENCE,
            &[
                &element(CONTEXT_0, &[&[2, 1, 2]]),
                &[2, 1, 9],
                &element(SEQUENCE, &[]),
                &element(SEQUENCE, &[&[0; 300]]),
                &element(SEQUENCE, &[&times[0], &times[1]]),
            ],
        );
        element(SEQUENCE, &[&body, &element(SEQUENCE, &[algorithm]), &[3, 1, 0]])
    }

    const TIMES: [(u8, &str); 2] =
        [(UTC_TIME, "991231235959Z"), (GENERALIZED_TIME, "20500101000000Z")];

    #[test]
    fn the_signature_names_the_hash() {
        let rsa = |n: u8| element(OBJECT_ID, &[&[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 1, 1, n]]);
        let sha2 = |n: u8| element(OBJECT_ID, &[&[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, n]]);
        let pss = |hash: &[u8]| {
            let hash = element(CONTEXT_0, &[&element(SEQUENCE, &[hash])]);
            [rsa(10), element(SEQUENCE, &[&hash])].concat()
        };
        let ecdsa = |n: u8| element(OBJECT_ID, &[&[0x2A, 0x86, 0x48, 0xCE, 0x3D, 4, 3, n]]);
        for (algorithm, bytes) in [
            (rsa(5), Some(32)),
            (rsa(11), Some(32)),
            (rsa(12), Some(48)),
            (rsa(13), Some(64)),
            (rsa(14), Some(28)),
            (pss(&sha2(3)), Some(64)),
            (ecdsa(3), Some(48)),
            (element(OBJECT_ID, &[&[0x2B, 0x65, 0x70]]), None),
        ] {
            let hash = end_point_hash(&certificate(&algorithm, TIMES));
            assert_eq!(hash.map(|hash| hash.len()), bytes, "{algorithm:x?}");
        }
    }

    #[test]
    fn validity_has_both_spellings_of_time() {
        let certificate = certificate(&[], TIMES);
        let at = |text: &str| is_valid_at(&certificate, text.parse().unwrap());
        assert!(at("1999-12-31T23:59:59Z") && at("2026-01-01T00:00:00Z"));
        assert!(!at("1999-12-31T23:59:58Z") && !at("2050-01-01T00:00:01Z"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(at in 0usize..400, value: u8) {
            let mut bytes = certificate(&[6, 1, 1], TIMES);
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = (end_point_hash(&bytes), validity(&bytes), validity(&bytes[..at]));
        }
    }
}
