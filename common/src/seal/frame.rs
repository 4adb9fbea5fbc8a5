//! Frames: the unit of compression and encryption.

use crate::{Error, Kind, Result};
use std::ops::Range;

/// No frame has more bytes before compression: 1 MiB.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// How a frame's bytes were packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are: compression did not pay.
    Raw = 0,
    Zstd = 1,
}

impl Codec {
    pub fn from_byte(byte: u8) -> Option<Codec> {
        match byte {
            0 => Some(Codec::Raw),
            1 => Some(Codec::Zstd),
            _ => None,
        }
    }
}

/// Compressed bytes that wait to be sealed.
#[derive(Clone, Debug)]
pub struct Frame {
    pub codec: Codec,
    pub plain_bytes: u32,
    pub bytes: Vec<u8>,
}

impl Frame {
    /// Compresses at most [`FRAME_BYTES_MAX`]; keeps them raw where that saves less than a twentieth.
    pub fn pack(packer: &mut Packer, plain: &[u8]) -> Result<Frame> {
        assert!(plain.len() <= FRAME_BYTES_MAX, "a frame of {} bytes", plain.len());
        let plain_bytes = plain.len() as u32;
        let packed = packer.compress(plain)?;
        // Frames wait in memory, and take no more of it than their bytes.
        Ok(match packed.len() < plain.len() - plain.len() / 20 {
            true => Frame { codec: Codec::Zstd, plain_bytes, bytes: packed.to_vec() },
            false => Frame { codec: Codec::Raw, plain_bytes, bytes: plain.to_vec() },
        })
    }

    /// Cuts `plain` into frames of the greatest size.
    pub fn pack_all(packer: &mut Packer, plain: &[u8]) -> Result<Vec<Frame>> {
        plain.chunks(FRAME_BYTES_MAX).map(|chunk| Frame::pack(packer, chunk)).collect()
    }

    pub(super) fn span(&self, number: u32, offset: u64) -> FrameSpan {
        FrameSpan {
            number,
            offset,
            sealed_bytes: (self.bytes.len() + super::TAG_BYTES) as u32,
            plain_bytes: self.plain_bytes,
            codec: self.codec,
        }
    }
}

/// Where a sealed frame lies in its object, and what is needed to open it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameSpan {
    pub number: u32,
    /// From the start of the object.
    pub offset: u64,
    pub sealed_bytes: u32,
    pub plain_bytes: u32,
    pub codec: Codec,
}

impl FrameSpan {
    /// False for what no writer can have made: longer than a frame or an object may be, shorter than a tag, or raw
    /// and yet of another length than its plain bytes.
    pub fn is_possible(&self) -> bool {
        let (plain, max) = (self.plain_bytes as usize, FRAME_BYTES_MAX);
        let Some(packed) = (self.sealed_bytes as usize).checked_sub(super::TAG_BYTES) else {
            return false;
        };
        let ends_inside = self
            .offset
            .checked_add(u64::from(self.sealed_bytes))
            .is_some_and(|end| end <= super::OBJECT_BYTES_MAX as u64);
        plain <= max
            && packed <= max
            && ends_inside
            && (self.codec == Codec::Zstd || packed == plain)
    }

    pub fn range(&self) -> Range<usize> {
        let start = self.offset as usize;
        start..start + self.sealed_bytes as usize
    }
}

/// A reusable zstd compressor and its buffer: one for each worker.
pub struct Packer {
    context: zstd::bulk::Compressor<'static>,
    /// Room for the worst case.
    room: Vec<u8>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Packer")
    }
}

impl Packer {
    /// `level` is zstd's: 1 to 19.
    pub fn new(level: i32) -> Result<Packer> {
        let context = zstd::bulk::Compressor::new(level).map_err(bug)?;
        Ok(Packer { context, room: Vec::new() })
    }

    fn compress(&mut self, plain: &[u8]) -> Result<&[u8]> {
        self.room.clear();
        self.room.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        self.context.compress_to_buffer(plain, &mut self.room).map_err(bug)?;
        Ok(&self.room)
    }
}

fn bug(error: std::io::Error) -> Error {
    Error::new(Kind::Bug, format!("zstd: {error}"))
}

/// Plain bytes of a frame begin at a multiple of this in memory, so that they can be written to a disk directly.
const ALIGNMENT: usize = 4096;

/// A reusable zstd decompressor and its buffers: one for each worker.
#[derive(Default)]
pub struct Unpacker {
    context: Option<zstd::bulk::Decompressor<'static>>,
    /// A frame that was decrypted, still compressed.
    packed: Vec<u8>,
    /// Room for the plain bytes of one frame, and to align them.
    plain: Vec<u8>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unpacker")
    }
}

impl Unpacker {
    pub fn new() -> Unpacker {
        Unpacker::default()
    }

    /// The plain bytes, exactly as many as `span` says and never more than [`FRAME_BYTES_MAX`]. `decrypt` gets the sealed
    /// bytes without their tag, to decrypt them where they are; false if it could not.
    pub(super) fn unpack(
        &mut self,
        span: &FrameSpan,
        body: &[u8],
        decrypt: impl FnOnce(&mut [u8]) -> bool,
    ) -> Result<&[u8], String> {
        let expected = span.plain_bytes as usize;
        if expected > FRAME_BYTES_MAX {
            return Err(format!("claims {expected} bytes, more than a frame may have"));
        }
        let got = match span.codec {
            Codec::Raw => self.decrypt_raw(expected, body, decrypt)?,
            Codec::Zstd => {
                self.packed.clear();
                self.packed.extend_from_slice(body);
                match decrypt(&mut self.packed) {
                    true => self.decompress(expected)?,
                    false => return Err(BAD_TAG.into()),
                }
            }
        };
        match got == expected {
            true => Ok(&*self.room(expected)),
            false => Err(format!("has {got} bytes, not the {expected} it should have")),
        }
    }

    fn decrypt_raw(
        &mut self,
        expected: usize,
        body: &[u8],
        decrypt: impl FnOnce(&mut [u8]) -> bool,
    ) -> Result<usize, String> {
        if body.len() != expected {
            return Err(format!("has {} bytes, not the {expected} it should have", body.len()));
        }
        let room = self.room(expected);
        room.copy_from_slice(body);
        match decrypt(room) {
            true => Ok(expected),
            false => Err(BAD_TAG.into()),
        }
    }

    fn decompress(&mut self, expected: usize) -> Result<usize, String> {
        if self.context.is_none() {
            let new = zstd::bulk::Decompressor::new().map_err(|e| format!("zstd: {e}"))?;
            self.context = Some(new);
        }
        let packed = std::mem::take(&mut self.packed);
        let mut context = self.context.take().expect("made above");
        let got = context.decompress_to_buffer(&packed, self.room(expected));
        (self.packed, self.context) = (packed, Some(context));
        got.map_err(|e| format!("cannot be decompressed: {e}"))
    }

    /// `bytes` bytes, at most [`FRAME_BYTES_MAX`], that begin at a multiple of [`ALIGNMENT`].
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        if self.plain.is_empty() {
            self.plain = vec![0; FRAME_BYTES_MAX + ALIGNMENT];
        }
        let start = self.plain.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        &mut self.plain[start..start + bytes]
    }
}

const BAD_TAG: &str = "fails its authentication tag";
