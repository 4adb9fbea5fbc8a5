//! The object `cluster`: a location is one of ours only if it has it.
//!
//! `init` makes it and nothing else does. An unmounted disk or a wrong prefix has none, and is unavailable,
//! never filled anew.

use crate::cbor::{self, Fields};
use crate::id::{ClusterName, SystemId};
use crate::name::ObjectName;
use crate::seal::{FORMAT_VERSION, Header, ObjectKind, Sealed, plain_object};
use crate::{Error, Kind, Result};
use bytes::Bytes;
use minicbor::{Decode, Encode};

/// What `cluster` says. It is not secret.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ClusterRecord {
    #[n(0)]
    pub format_version: u16,
    #[n(1)]
    pub cluster: ClusterName,
    /// The system for which the location was made.
    #[n(2)]
    pub system: SystemId,
    /// Unix seconds.
    #[n(3)]
    pub made: i64,
}

impl Fields for ClusterRecord {
    const KNOWN: u64 = 4;
    const WHAT: &'static str = "the object cluster";
}

impl ClusterRecord {
    pub fn new(cluster: ClusterName, system: SystemId, made: jiff::Timestamp) -> ClusterRecord {
        ClusterRecord { format_version: FORMAT_VERSION, cluster, system, made: made.as_second() }
    }

    pub fn object(&self) -> Sealed {
        plain_object(ObjectKind::Cluster, cbor::encode(self), |_| ObjectName::Cluster)
    }

    /// Reads the object, and refuses a format that this version does not know.
    pub fn read(bytes: &Bytes) -> Result<ClusterRecord> {
        let header = Header::check(bytes, &ObjectName::Cluster)?;
        let record: ClusterRecord = cbor::decode(header.plain())?;
        match record.format_version {
            FORMAT_VERSION => Ok(record),
            other => Err(Error::new(
                Kind::Config,
                format!(
                    "the location has format version {other}; this program knows {FORMAT_VERSION}"
                ),
            )
            .remedy("use a version of Backstay that knows it")),
        }
    }
}
