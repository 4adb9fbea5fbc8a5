//! The metadata of one stored object, from its two ends where it is large: two small requests instead of the whole.
//!
//! What comes back is authentic; that the frames between the ends are undamaged is not known.

use crate::Result;
use crate::id::EpochId;
use crate::keys::Epoch;
use crate::location::Location;
use crate::name::ObjectName;
use crate::pool;
use crate::seal::{HEADER_BYTES_MAX, Header, Object, Peek};
use bytes::Bytes;

/// A footer that is longer than this costs the whole object.
const TAIL_BYTES: u64 = 32 << 10;
/// An object up to this size is fetched whole rather than in two requests.
const WHOLE_BYTES_MAX: u64 = 256 << 10;

/// What was fetched of an object: enough to read its metadata, once its epoch's key is there.
#[derive(Debug)]
pub enum Fetched {
    Ends(Peek),
    Whole { bytes: Bytes, name: ObjectName, epoch: EpochId },
}

/// Fetches what it takes of `name`, which has `size` bytes, as listed, and no plain section. Safe to drop.
pub async fn fetch(location: &Location, name: &ObjectName, size: u64) -> Result<Fetched> {
    if size > WHOLE_BYTES_MAX {
        let parts = futures::try_join!(
            location.get_range(name, 0..HEADER_BYTES_MAX as u64),
            location.get_range(name, size - TAIL_BYTES..size),
        );
        // The size may have been listed at another location. Where the copies differ in size, the ends say nothing, and
        // the whole object tells what is wrong with it, if anything is.
        if let Ok(Some(peek)) = parts.and_then(|(head, tail)| Peek::read(&head, &tail, name)) {
            return Ok(Fetched::Ends(peek));
        }
    }
    let bytes = location.get(name).await?;
    let (checked, its_name) = (bytes.clone(), name.clone());
    let header = pool::run(move || Header::check(&checked, &its_name)).await??;
    Ok(Fetched::Whole { bytes, name: name.clone(), epoch: header.epoch() })
}

impl Fetched {
    /// The epoch to open it with.
    pub fn epoch(&self) -> EpochId {
        match self {
            Fetched::Ends(peek) => peek.epoch(),
            Fetched::Whole { epoch, .. } => *epoch,
        }
    }

    /// The kind's own metadata, checked and decrypted.
    pub fn meta(self, epoch: &Epoch) -> Result<Vec<u8>> {
        match self {
            Fetched::Ends(peek) => peek.meta(epoch),
            Fetched::Whole { bytes, name, .. } => {
                Ok(Object::open(bytes, &name, epoch)?.meta().to_vec())
            }
        }
    }
}
