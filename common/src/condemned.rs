//! `condemned/<run>`: what one run of prune is about to delete at this location.
//!
//! Deletion waits until the object is a day old by the store's clock, and looks again whether all that it names is still
//! unreferenced. The newest one also remembers the window that was last applied here.

use crate::cbor::{self, Fields};
use crate::id::{AgentName, SystemId};
use crate::keys::Epoch;
use crate::name::ObjectName;
use crate::seal::{self, Draft, Header, ObjectKind, Sealed};
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// No object names more; what is more waits for the next run.
pub const NAMES_MAX: usize = 200_000;

/// The plain section; it needs no key to be read.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Condemned {
    #[n(0)]
    pub agent: AgentName,
    /// Of the lease under which it was made; 0 where there was none.
    #[n(1)]
    pub generation: u64,
    /// The window that was applied, in seconds.
    #[n(2)]
    pub window: u64,
    /// By the agent's clock, Unix seconds.
    #[n(3)]
    pub made: i64,
    /// Names of objects of this system.
    #[n(4)]
    pub names: Vec<String>,
}

impl Fields for Condemned {
    const KNOWN: u64 = 5;
    const WHAT: &'static str = "a list of what is condemned";
}

impl Condemned {
    /// The plain section, after the trailer has been checked. Needs no key.
    pub fn read(bytes: &Bytes, name: &ObjectName) -> Result<Condemned> {
        let header = Header::check(bytes, name)?;
        match name {
            ObjectName::Condemned { .. } => cbor::decode(header.plain()),
            _ => Err(Error::new(Kind::Bug, format!("{name} condemns nothing"))),
        }
    }

    /// At most [`NAMES_MAX`] names fit into an object.
    pub fn seal(&self, epoch: &Epoch, system: SystemId) -> Sealed {
        assert!(self.names.len() <= NAMES_MAX, "{} names", self.names.len());
        let draft = Draft {
            kind: ObjectKind::Condemned,
            plain: cbor::encode(self),
            frames: Vec::new(),
            meta: Vec::new(),
        };
        seal::seal(draft, epoch, |run| ObjectName::Condemned { system, run })
    }

    /// What it names, as far as it names objects of `system`. Whoever may write to a store may put anything here, and it is
    /// still marked again before anything is deleted.
    pub fn objects(&self, system: SystemId) -> impl Iterator<Item = ObjectName> {
        let names = self.names.iter().filter_map(|name| name.parse::<ObjectName>().ok());
        names.filter(move |name| name.system() == Some(system))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_back_without_a_key_and_names_only_objects_of_its_system() {
        let names = ["7/pack/7703e7e54e46b304", "8/pack/7703e7e54e46b304", "cluster", "../etc"];
        let condemned = Condemned {
            agent: "db1".parse().unwrap(),
            generation: 0,
            window: 604_800,
            made: 5,
            names: names.map(String::from).into(),
        };
        let system = SystemId::new(7);
        let sealed = condemned.seal(&Epoch::generate(), system);
        assert_eq!(Condemned::read(&sealed.bytes, &sealed.name).unwrap(), condemned);
        let objects: Vec<String> = condemned.objects(system).map(|name| name.to_string()).collect();
        assert_eq!(objects, names[..1]);
    }
}
