//! Manifests for tests, each of which says what matters to it.

use super::{ManifestPlain, Root};
use crate::id::{Branch, SnapshotId, SystemId};
use crate::lsn::Lsn;

/// A snapshot of nothing, on a server with segments of 16 MiB.
pub fn plain(system: SystemId, snapshot: SnapshotId, branch: Branch) -> ManifestPlain {
    let began = snapshot.began().as_second();
    ManifestPlain {
        snapshot,
        system,
        branch,
        start: Lsn::new(0x28),
        stop: Lsn::new(0x100),
        segment_bytes: 16 << 20,
        generation: 0,
        began,
        finished: began + 1,
        server_version: 150_018,
        epochs: Vec::new(),
        packs: Vec::new(),
        database_bytes: 0,
        stored_bytes: 0,
        files: 0,
        parent: None,
        corrupt_pages: 0,
        abandoned: None,
        new_corrupt_pages: None,
    }
}

/// Of a cluster with page checksums, and without a file.
pub fn root() -> Root {
    Root {
        cluster: "orders".parse().expect("a name"),
        agent: "db1".parse().expect("a name"),
        hash_key: [0; 32],
        page_bytes: 8192,
        table: Vec::new(),
        backup_label: String::new(),
        tablespaces: Vec::new(),
        config_files: Vec::new(),
        superuser: "postgres".into(),
        checksums: true,
        corrupt_pages: Vec::new(),
        written_by: "test".into(),
    }
}
