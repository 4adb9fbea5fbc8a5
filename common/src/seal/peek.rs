//! An object's metadata from its first and last bytes, without the frames between.
//!
//! The footer carries its own authentication tag under a key that derives from the whole header, so what is read in
//! this way is authentic; that the frames are undamaged is not known.

use super::{Cipher, FOOTER_LENGTH_BYTES, FOOTER_NUMBER, Header, Opener, TRAILER_BYTES};
use crate::keys::Epoch;
use crate::name::ObjectName;
use crate::{Error, Kind, Result};
use bytes::Bytes;

/// The header and the sealed footer of one object.
#[derive(Debug)]
pub struct Peek {
    header: Header,
    sealed_footer: Bytes,
}

impl Peek {
    /// `head` is the object's beginning, at least its whole header; `tail` its end. `None` if the footer is longer than `tail`.
    pub fn read(head: &Bytes, tail: &Bytes, expected: &ObjectName) -> Result<Option<Peek>> {
        let corrupt =
            |reason: String| Error::new(Kind::Corrupt, format!("object {expected}: {reason}"));
        let header = Header::parse(head).map_err(corrupt)?;
        if header.name() != expected {
            let name = header.name();
            return Err(corrupt(format!("it is in truth object {name}"))
                .remedy("somebody renamed or swapped objects; read it from another location"));
        }
        let Some(end) = tail.len().checked_sub(TRAILER_BYTES + FOOTER_LENGTH_BYTES) else {
            return Ok(None);
        };
        let length = tail[end..end + FOOTER_LENGTH_BYTES].try_into().expect("4 bytes");
        let start = end.checked_sub(u32::from_le_bytes(length) as usize);
        Ok(start.map(|start| Peek { header, sealed_footer: tail.slice(start..end) }))
    }

    /// The epoch to open it with.
    pub fn epoch(&self) -> crate::id::EpochId {
        self.header.epoch()
    }

    /// The kind's own metadata, checked and decrypted.
    pub fn meta(&self, epoch: &Epoch) -> Result<Vec<u8>> {
        let opener = Opener::new(&self.header, epoch)?;
        let cipher: &Cipher = &opener.cipher;
        let corrupt = |reason: &str| {
            let name = self.header.name();
            Error::new(Kind::Corrupt, format!("object {name}: its footer {reason}"))
        };
        let footer = (cipher.open(FOOTER_NUMBER, &self.sealed_footer))
            .ok_or_else(|| corrupt("fails its authentication tag"))?;
        footer_meta(&footer).ok_or_else(|| corrupt("does not describe its frames"))
    }
}

impl Opener {
    /// The kind's own metadata, from the object's last bytes; none if the footer is longer than `tail`. The
    /// opener's key derives from the whole header, so what is read is authentic.
    pub fn meta_of_tail(&self, tail: &[u8]) -> Result<Option<Vec<u8>>> {
        let corrupt = |reason: &str| {
            Error::new(Kind::Corrupt, format!("object {}: its footer {reason}", self.name))
        };
        let end = tail.len().checked_sub(TRAILER_BYTES + FOOTER_LENGTH_BYTES);
        let end = end.ok_or_else(|| corrupt("has no room"))?;
        let length = tail[end..end + FOOTER_LENGTH_BYTES].try_into().expect("4 bytes");
        let Some(start) = end.checked_sub(u32::from_le_bytes(length) as usize) else {
            return Ok(None);
        };
        let footer = self.cipher.open(FOOTER_NUMBER, &tail[start..end]);
        let footer = footer.ok_or_else(|| corrupt("fails its authentication tag"))?;
        let meta = footer_meta(&footer).ok_or_else(|| corrupt("does not describe its frames"))?;
        Ok(Some(meta))
    }
}

/// What follows the list of frames: nine bytes for each.
fn footer_meta(footer: &[u8]) -> Option<Vec<u8>> {
    let (frames, rest) = footer.split_first_chunk::<4>()?;
    let list_bytes = (u32::from_le_bytes(*frames) as usize).checked_mul(9)?;
    Some(rest.get(list_bytes..)?.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SystemId;
    use crate::seal::{Draft, Frame, ObjectKind, Packer, seal};

    #[test]
    fn the_ends_of_an_object_give_its_metadata() {
        let epoch = Epoch::generate();
        let draft = Draft {
            kind: ObjectKind::Pack,
            plain: Vec::new(),
            frames: Frame::pack_all(&mut Packer::new(1).unwrap(), &vec![7; 3 << 20]).unwrap(),
            meta: b"what it says".to_vec(),
        };
        let system = SystemId::new(7);
        let sealed = seal(draft, &epoch, |id| ObjectName::Pack { system, id });
        let size = sealed.bytes.len();
        let head = sealed.bytes.slice(..sealed.header.len());
        let tail = sealed.bytes.slice(size - 200..);
        let peek = Peek::read(&head, &tail, &sealed.name).unwrap().unwrap();
        assert_eq!(
            (peek.epoch(), peek.meta(&epoch).unwrap()),
            (epoch.id(), b"what it says".to_vec())
        );
        assert!(
            Peek::read(&head, &sealed.bytes.slice(size - 40..), &sealed.name).unwrap().is_none()
        );
        let opener = Opener::new(&sealed.header, &epoch).unwrap();
        assert_eq!(opener.meta_of_tail(&tail).unwrap().unwrap(), b"what it says");
        assert!(opener.meta_of_tail(&tail[160..]).unwrap().is_none());
        let mut damaged = tail.to_vec();
        damaged[200 - 50] ^= 1;
        assert_eq!(opener.meta_of_tail(&damaged).unwrap_err().kind(), Kind::Corrupt);
        let mut damaged = tail.to_vec();
        damaged[200 - 50] ^= 1;
        let peek = Peek::read(&head, &damaged.into(), &sealed.name).unwrap().unwrap();
        assert_eq!(peek.meta(&epoch).unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(peek.meta(&Epoch::generate()).unwrap_err().kind(), Kind::Corrupt);
        let other = ObjectName::Pack { system, id: crate::id::ObjectId::random() };
        assert_eq!(Peek::read(&head, &tail, &other).unwrap_err().kind(), Kind::Corrupt);
    }
}
