//! The envelope of every stored object: zstd, then AES-256-GCM, then BLAKE3.
//!
//! ```text
//! header │ plain section │ sealed frame 0 … n-1 │ sealed footer │ footer length │ BLAKE3
//! ```
//!
//! What always holds:
//! - Damage anywhere is found with no key at all, by the BLAKE3 trailer ([`check_trailer`]).
//! - With the key, forgery, truncation, reordering and swapping are found: the object's key derives from the
//!   epoch key and the whole header with the plain section; the header holds the object's name; the
//!   associated data of a frame is the kind, its number and whether it is the footer.
//! - A nonce never repeats under one key: it is the frame's number, and [`seal`] takes its draft by value.
//! - The salt is not the caller's to choose. It hashes fresh random bytes, a counter and the compressed
//!   frames, so that even with a broken random generator equal salts mean equal contents.
//!
//! `FORMAT.md` has the bytes.

mod frame;
mod header;
mod peek;

pub use frame::{Codec, FRAME_BYTES_MAX, Frame, FrameSpan, Packer, Unpacker};
pub use header::{FORMAT_VERSION, HEADER_BYTES_MAX, Header, ObjectKind, Suite};
pub use peek::Peek;

use crate::id::{EpochId, ObjectId, random_bytes};
use crate::keys::Epoch;
use crate::name::ObjectName;
use crate::{Error, Kind, Result};
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use bytes::Bytes;
use header::Fixed;
use std::sync::atomic::{AtomicU64, Ordering};
use zeroize::Zeroizing;

/// Bytes that AES-GCM adds to each frame.
pub const TAG_BYTES: usize = 16;
/// The BLAKE3 hash at the end of every object.
pub const TRAILER_BYTES: usize = 32;
/// No object is larger: one PUT each, and never a multipart upload.
pub const OBJECT_BYTES_MAX: usize = 64 << 20;
/// What is unpacked as a whole (WAL, the root of a manifest) is no longer: 64 MiB.
pub const CONTENTS_BYTES_MAX: usize = 64 << 20;
/// Bytes of the footer's length, before the trailer.
const FOOTER_LENGTH_BYTES: usize = 4;
/// What follows the sealed footer: its length, and the trailer.
pub const TAIL_BYTES: usize = FOOTER_LENGTH_BYTES + TRAILER_BYTES;
/// What stands for the footer where frames have their number.
const FOOTER_NUMBER: u64 = u64::MAX;

/// What will become one sealed object.
#[derive(Debug)]
pub struct Draft {
    pub kind: ObjectKind,
    /// Authenticated, but readable without a key.
    pub plain: Vec<u8>,
    /// Compressed, in order.
    pub frames: Vec<Frame>,
    /// The kind's own metadata, sealed in the footer.
    pub meta: Vec<u8>,
}

/// An object as it is stored.
#[derive(Clone, Debug)]
pub struct Sealed {
    pub name: ObjectName,
    pub header: Header,
    pub bytes: Bytes,
    /// Where each frame lies in `bytes`.
    pub spans: Vec<FrameSpan>,
}

impl Sealed {
    /// The trailer: BLAKE3 of all that precedes it.
    pub fn hash(&self) -> [u8; TRAILER_BYTES] {
        trailer_of(&self.bytes)
    }
}

/// The trailer of a whole object.
pub fn trailer_of(object: &[u8]) -> [u8; TRAILER_BYTES] {
    object[object.len() - TRAILER_BYTES..].try_into().expect("32 bytes")
}

/// Seals `draft` under `epoch`. `name` gets the id that the salt gives, and says what the object is called.
///
/// Sealing the same draft again gives other bytes and another id.
pub fn seal(draft: Draft, epoch: &Epoch, name: impl FnOnce(ObjectId) -> ObjectName) -> Sealed {
    let salt = hedged_salt(epoch, &draft);
    let name = name(ObjectId::from_bytes(salt[..8].try_into().expect("8 bytes")));
    let fixed = Fixed { kind: draft.kind, suite: Suite::Sealed, name, epoch: epoch.id(), salt };
    assert_eq!(ObjectKind::of(&fixed.name), draft.kind, "the kind of {}", fixed.name);
    let (key, commitment) = object_key(epoch, &fixed, &draft.plain);
    let header = Header::new(fixed, commitment, draft.plain.into());

    let footer_plain = encode_footer(&draft.frames, &draft.meta);
    let frames_bytes: usize = draft.frames.iter().map(|f| f.bytes.len() + TAG_BYTES).sum();
    let mut out = Vec::with_capacity(
        header.len() + frames_bytes + footer_plain.len() + TAG_BYTES + 4 + TRAILER_BYTES,
    );
    header.write(&mut out);
    let cipher = Cipher::new(&key, draft.kind);
    let mut spans = Vec::with_capacity(draft.frames.len());
    for (number, frame) in draft.frames.iter().enumerate() {
        let offset = out.len() as u64;
        cipher.append(&mut out, number as u64, &frame.bytes);
        spans.push(frame.span(number as u32, offset));
    }
    let footer_start = out.len();
    cipher.append(&mut out, FOOTER_NUMBER, &footer_plain);
    let footer_bytes = (out.len() - footer_start) as u32;
    finish(&mut out, footer_bytes);
    Sealed { name: header.name().clone(), header, bytes: out.into(), spans }
}

/// An object that needs no key to be read: `cluster`, and the wraps of epoch keys.
pub fn plain_object(
    kind: ObjectKind,
    plain: Vec<u8>,
    name: impl FnOnce(ObjectId) -> ObjectName,
) -> Sealed {
    let salt: [u8; 32] = random_bytes();
    let name = name(ObjectId::from_bytes(salt[..8].try_into().expect("8 bytes")));
    let epoch = EpochId::from_bytes([0; 16]);
    let fixed = Fixed { kind, suite: Suite::Plain, name, epoch, salt };
    let header = Header::new(fixed, [0; 32], plain.into());
    let mut out = Vec::with_capacity(header.len() + FOOTER_LENGTH_BYTES + TRAILER_BYTES);
    header.write(&mut out);
    finish(&mut out, 0);
    Sealed { name: header.name().clone(), header, bytes: out.into(), spans: Vec::new() }
}

fn finish(out: &mut Vec<u8>, footer_bytes: u32) {
    out.extend_from_slice(&footer_bytes.to_le_bytes());
    let hash = blake3::hash(out);
    out.extend_from_slice(hash.as_bytes());
    assert!(out.len() <= OBJECT_BYTES_MAX, "an object of {} bytes was drafted", out.len());
}

fn encode_footer(frames: &[Frame], meta: &[u8]) -> Vec<u8> {
    let mut footer = Vec::with_capacity(4 + frames.len() * 9 + meta.len());
    footer.extend_from_slice(&(frames.len() as u32).to_le_bytes());
    for frame in frames {
        footer.extend_from_slice(&((frame.bytes.len() + TAG_BYTES) as u32).to_le_bytes());
        footer.extend_from_slice(&frame.plain_bytes.to_le_bytes());
        footer.push(frame.codec as u8);
    }
    footer.extend_from_slice(meta);
    footer
}

fn hedged_salt(epoch: &Epoch, draft: &Draft) -> [u8; 32] {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let mut hasher = blake3::Hasher::new_keyed(epoch.salt_key());
    hasher.update(&random_bytes::<32>());
    hasher.update(&COUNTER.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    hasher.update(&[draft.kind as u8]);
    for part in [&draft.plain, &draft.meta] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    for frame in &draft.frames {
        hasher.update(&[frame.codec as u8]);
        hasher.update(&frame.plain_bytes.to_le_bytes());
        hasher.update(&(frame.bytes.len() as u64).to_le_bytes());
        hasher.update(&frame.bytes);
    }
    *hasher.finalize().as_bytes()
}

/// The object's key, and the commitment that tells a wrong epoch key from damage.
fn object_key(epoch: &Epoch, fixed: &Fixed, plain: &[u8]) -> (Zeroizing<[u8; 32]>, [u8; 32]) {
    let mut hasher = blake3::Hasher::new_keyed(epoch.object_key());
    hasher.update(&fixed.encode(plain.len() as u32));
    hasher.update(plain);
    let mut out = Zeroizing::new([0; 64]);
    hasher.finalize_xof().fill(&mut out[..]);
    let mut key = Zeroizing::new([0; 32]);
    key.copy_from_slice(&out[..32]);
    (key, out[32..].try_into().expect("32 bytes"))
}

/// AES-256-GCM with the nonces and associated data of one object.
struct Cipher {
    aead: Aes256Gcm,
    kind: ObjectKind,
}

impl Cipher {
    fn new(key: &[u8; 32], kind: ObjectKind) -> Cipher {
        Cipher { aead: Aes256Gcm::new(key.into()), kind }
    }

    fn nonce(number: u64) -> Nonce<aes_gcm::aead::consts::U12> {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&number.to_be_bytes());
        nonce.into()
    }

    fn associated(&self, number: u64) -> [u8; 10] {
        let mut data = [0; 10];
        data[0] = self.kind as u8;
        data[1..9].copy_from_slice(&number.to_be_bytes());
        data[9] = u8::from(number == FOOTER_NUMBER);
        data
    }

    fn append(&self, out: &mut Vec<u8>, number: u64, plain: &[u8]) {
        let start = out.len();
        out.extend_from_slice(plain);
        let tag = self
            .aead
            .encrypt_inout_detached(
                &Cipher::nonce(number),
                &self.associated(number),
                (&mut out[start..]).into(),
            )
            .expect("a frame is far below AES-GCM's limit of 64 GiB");
        out.extend_from_slice(&tag);
    }

    /// `None` if the tag does not fit.
    fn open(&self, number: u64, sealed: &[u8]) -> Option<Vec<u8>> {
        let (body, tag) = sealed.split_last_chunk::<TAG_BYTES>()?;
        let mut plain = body.to_vec();
        self.open_in_place(number, &mut plain, tag).then_some(plain)
    }

    /// False if the tag does not fit; `body` is then worth nothing.
    fn open_in_place(&self, number: u64, body: &mut [u8], tag: &[u8; TAG_BYTES]) -> bool {
        let (nonce, associated) = (Cipher::nonce(number), self.associated(number));
        let opened =
            self.aead.decrypt_inout_detached(&nonce, &associated, body.into(), &Tag::from(*tag));
        opened.is_ok()
    }
}

/// Finds damage without a key: the last 32 bytes must be the BLAKE3 of all before them.
pub fn check_trailer(object: &[u8], name: &str) -> Result<()> {
    let corrupt =
        |reason: String| Err(Error::new(Kind::Corrupt, format!("object {name} {reason}")));
    if object.len() < TRAILER_BYTES {
        return corrupt(format!("is only {} bytes long", object.len()));
    }
    let (body, trailer) = object.split_at(object.len() - TRAILER_BYTES);
    match blake3::hash(body) == *trailer {
        true => Ok(()),
        false => corrupt("does not match its BLAKE3 trailer: it is damaged or truncated".into()),
    }
}

/// Opens the frames of one object whose header is known.
pub struct Opener {
    cipher: Cipher,
    name: ObjectName,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Opener {
    /// Fails with [`Kind::Corrupt`] if the header was not made under `epoch`'s key.
    pub fn new(header: &Header, epoch: &Epoch) -> Result<Opener> {
        use subtle::ConstantTimeEq;
        let (key, commitment) = object_key(epoch, header.fixed(), header.plain());
        if !bool::from(commitment.ct_eq(header.commitment())) {
            return Err(Error::new(
                Kind::Corrupt,
                format!(
                    "object {} was not sealed under epoch {} as it is",
                    header.name(),
                    epoch.id()
                ),
            )
            .remedy("its header or plain section was altered; read it from another location"));
        }
        let cipher = Cipher::new(&key, header.kind());
        Ok(Opener { cipher, name: header.name().clone() })
    }

    /// Checks, decrypts and decompresses frame `span.number`, whose stored bytes are `sealed`.
    pub fn frame(
        &self,
        span: &FrameSpan,
        sealed: &[u8],
        unpacker: &mut Unpacker,
    ) -> Result<Vec<u8>> {
        self.frame_in(span, sealed, unpacker).map(<[u8]>::to_vec)
    }

    /// The same without a copy: the plain bytes lie in the unpacker's buffer, from a multiple of 4096 in memory on.
    pub fn frame_in<'u>(
        &self,
        span: &FrameSpan,
        sealed: &[u8],
        unpacker: &'u mut Unpacker,
    ) -> Result<&'u [u8]> {
        let corrupt = |reason: &str| {
            let name = &self.name;
            Error::new(Kind::Corrupt, format!("frame {} of object {name} {reason}", span.number))
        };
        let (body, tag) = sealed
            .split_last_chunk::<TAG_BYTES>()
            .ok_or_else(|| corrupt("fails its authentication tag"))?;
        let number = u64::from(span.number);
        unpacker
            .unpack(span, body, |body| self.cipher.open_in_place(number, body, tag))
            .map_err(|reason| corrupt(&reason))
    }
}

/// A whole object, checked: its trailer, its name, its footer. Frames are opened on demand.
#[derive(Debug)]
pub struct Object {
    header: Header,
    bytes: Bytes,
    opener: Opener,
    spans: Vec<FrameSpan>,
    meta: Vec<u8>,
}

impl Object {
    /// `expected` is the name it was fetched by, `epoch` the one that its header names.
    pub fn open(bytes: Bytes, expected: &ObjectName, epoch: &Epoch) -> Result<Object> {
        let header = Header::check(&bytes, expected)?;
        let opener = Opener::new(&header, epoch)?;
        let corrupt =
            |reason| Error::new(Kind::Corrupt, format!("object {expected}: its footer {reason}"));
        let sealed = footer_range(&bytes, &header).ok_or_else(|| corrupt("has no room"))?;
        let footer = (opener.cipher.open(FOOTER_NUMBER, &bytes[sealed.clone()]))
            .ok_or_else(|| corrupt("fails its authentication tag"))?;
        let (spans, meta) = decode_footer(&footer, header.len() as u64, sealed.start as u64)
            .ok_or_else(|| corrupt("does not describe its frames"))?;
        Ok(Object { header, bytes, opener, spans, meta })
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    pub fn spans(&self) -> &[FrameSpan] {
        &self.spans
    }

    /// The kind's own metadata.
    pub fn meta(&self) -> &[u8] {
        &self.meta
    }

    /// The plain bytes of one frame.
    pub fn frame(&self, number: usize, unpacker: &mut Unpacker) -> Result<Vec<u8>> {
        let span = &self.spans[number];
        self.opener.frame(span, &self.bytes[span.range()], unpacker)
    }

    /// All frames' plain bytes, in order: at most [`CONTENTS_BYTES_MAX`].
    pub fn contents(&self) -> Result<Vec<u8>> {
        let mut unpacker = Unpacker::new();
        let total = self.spans.iter().map(|s| s.plain_bytes as usize).sum();
        if total > CONTENTS_BYTES_MAX {
            let name = self.header.name();
            let reason = format!("object {name} unpacks to {total} bytes, more than it may");
            return Err(Error::new(Kind::Corrupt, reason));
        }
        let mut contents = Vec::with_capacity(total);
        for number in 0..self.spans.len() {
            let span = &self.spans[number];
            let sealed = &self.bytes[span.range()];
            contents.extend_from_slice(self.opener.frame_in(span, sealed, &mut unpacker)?);
        }
        Ok(contents)
    }
}

impl Opener {
    /// The kind's own metadata, out of the object's sealed footer. `frames_start` is where the object's header ends,
    /// `footer_start` where the sealed footer begins.
    pub fn footer_meta(
        &self,
        sealed: &[u8],
        frames_start: u64,
        footer_start: u64,
    ) -> Result<Vec<u8>> {
        let corrupt = |reason| {
            let name = &self.name;
            Error::new(Kind::Corrupt, format!("object {name}: its footer {reason}"))
        };
        let footer = (self.cipher.open(FOOTER_NUMBER, sealed))
            .ok_or_else(|| corrupt("fails its authentication tag"))?;
        let (_, meta) = decode_footer(&footer, frames_start, footer_start)
            .ok_or_else(|| corrupt("does not describe its frames"))?;
        Ok(meta)
    }
}

/// Where the sealed footer of an object of `size` bytes lies, by its last [`TAIL_BYTES`]. None of it has been checked.
pub fn footer_place(tail: &[u8; TAIL_BYTES], size: u64) -> Option<std::ops::Range<u64>> {
    let length = u32::from_le_bytes(*tail.first_chunk()?);
    let end = size.checked_sub(TAIL_BYTES as u64)?;
    Some(end.checked_sub(u64::from(length))?..end)
}

/// Where the sealed footer lies.
fn footer_range(object: &[u8], header: &Header) -> Option<std::ops::Range<usize>> {
    let end = object.len().checked_sub(TRAILER_BYTES + FOOTER_LENGTH_BYTES)?;
    let length = u32::from_le_bytes(object[end..end + 4].try_into().ok()?) as usize;
    let start = end.checked_sub(length)?;
    (start >= header.len()).then_some(start..end)
}

/// The frames and the metadata; `None` unless the frames exactly fill what lies before the footer.
fn decode_footer(
    footer: &[u8],
    frames_start: u64,
    frames_end: u64,
) -> Option<(Vec<FrameSpan>, Vec<u8>)> {
    let (stated, mut rest) = footer.split_first_chunk::<4>()?;
    let stated = u32::from_le_bytes(*stated);
    let mut offset = frames_start;
    let mut spans = Vec::with_capacity((stated as usize).min(footer.len() / 9));
    for number in 0..stated {
        let (entry, after) = rest.split_first_chunk::<9>()?;
        let word = |at: usize| {
            u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
        };
        let span = FrameSpan {
            number,
            offset,
            sealed_bytes: word(0),
            plain_bytes: word(4),
            codec: Codec::from_byte(entry[8])?,
        };
        if !span.is_possible() {
            return None;
        }
        offset += u64::from(span.sealed_bytes);
        spans.push(span);
        rest = after;
    }
    (offset == frames_end).then(|| (spans, rest.to_vec()))
}

#[cfg(test)]
mod tests;
