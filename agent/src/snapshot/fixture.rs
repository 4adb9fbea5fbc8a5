//! What the tests of snapshots share: locations in folders, and a reader of what was stored there.

use super::cache::CacheWriter;
use super::pace::Pace;
use super::progress::Meter;
use super::read::Reading;
use super::readers::Pool;
use super::ship::{Fleet, Parcel};
use crate::epochs::Epochs;
use crate::writer::Writer;
use backstay_common::cluster::ClusterRecord;
use backstay_common::config::Priority;
use backstay_common::id::{SnapshotId, SystemId};
use backstay_common::keys::Keyring;
use backstay_common::keys::file::FileProvider;
use backstay_common::location::{Location, LocationSettings};
use backstay_common::name::ObjectName;
use backstay_common::seal::{Object, Unpacker};
use backstay_common::snapshot::{Begin, BytesRef, Content, FileEntry, FileMap, FrameRef};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

pub const SYSTEM: SystemId = SystemId::new(7);
pub const PAGE: u32 = 8192;

/// Readers that know of nothing older.
pub fn pool(reading: Arc<Reading>, cache: Arc<CacheWriter>, meter: Arc<Meter>) -> Pool {
    Pool {
        reading,
        parent: None,
        leftover: Arc::default(),
        cache,
        meter,
        pace: Arc::new(Pace::new(None)),
        priority: Priority::Normal,
        readers: 2,
        jobs_max: 16,
    }
}

/// Locations below one folder, named after theirs.
pub struct Store {
    pub epochs: Arc<Epochs>,
    pub writers: Vec<Arc<Writer>>,
}

impl Store {
    pub fn new(dir: &Path, names: &[&str]) -> Store {
        let provider = Arc::new(FileProvider::generate());
        let keyring = Arc::new(Keyring::new(provider, "test".parse().unwrap()));
        let epochs = Arc::new(Epochs::new(keyring, SYSTEM, &dir.join("state")).unwrap());
        let writers = names.iter().map(|name| {
            let url = format!("file://{}", dir.join(name).display());
            let settings = LocationSettings::new(name.parse().unwrap(), url);
            let expected = ("test".parse().unwrap(), SYSTEM);
            Arc::new(Writer::new(Location::open(&settings).unwrap(), epochs.clone(), expected))
        });
        Store { writers: writers.collect(), epochs }
    }

    /// What `init` does.
    pub async fn init(&self, n: usize) {
        let location = self.writers[n].location();
        location.create_root().await.unwrap();
        let made = jiff::Timestamp::UNIX_EPOCH;
        let cluster = ClusterRecord::new("test".parse().unwrap(), SYSTEM, made).object();
        location.put(&cluster.name, cluster.bytes).await.unwrap();
    }

    pub async fn fleet(&self, snapshot: SnapshotId) -> Fleet {
        let agent = "a".parse().unwrap();
        let begin = Begin { snapshot, agent, parent: None, generation: 0 };
        let epoch = self.epochs.current().await.unwrap();
        let sealed = begin.seal(&epoch, SYSTEM);
        Fleet::new(&self.writers, Parcel::new(sealed.name, epoch.id(), sealed.bytes, None))
    }
}

/// Reads frames back from the first location, as a restore would.
pub struct ReadBack<'a> {
    pub store: &'a Store,
    packs: HashMap<ObjectName, Object>,
}

impl<'a> ReadBack<'a> {
    pub fn new(store: &'a Store) -> ReadBack<'a> {
        ReadBack { store, packs: HashMap::new() }
    }

    pub async fn frame(&mut self, frame: &FrameRef) -> Vec<u8> {
        let name = ObjectName::Pack { system: SYSTEM, id: frame.pack };
        if !self.packs.contains_key(&name) {
            let bytes = self.store.writers[0].location().get(&name).await.unwrap();
            let epoch = self.store.epochs.current().await.unwrap();
            self.packs.insert(name.clone(), Object::open(bytes, &name, &epoch).unwrap());
        }
        let object = &self.packs[&name];
        let number = frame.span.number as usize;
        assert_eq!(object.spans()[number], frame.span);
        object.frame(number, &mut Unpacker::new()).unwrap()
    }

    pub fn meta(&self, frame: &FrameRef) -> &[u8] {
        self.packs[&ObjectName::Pack { system: SYSTEM, id: frame.pack }].meta()
    }

    pub async fn bytes(&mut self, bytes: &BytesRef) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in &bytes.pieces {
            let frame = self.frame(&piece.frame).await;
            out.extend_from_slice(&frame[piece.at as usize..][..piece.bytes as usize]);
        }
        out
    }

    pub async fn file(&mut self, entry: &FileEntry) -> Vec<u8> {
        match &entry.content {
            Content::Empty => Vec::new(),
            Content::Within { frame, at } => {
                self.frame(frame).await[*at as usize..][..entry.size as usize].to_vec()
            }
            Content::Mapped(map) => {
                let map = self.bytes(map).await;
                let map = FileMap::decode(&map, entry.size, PAGE).unwrap();
                let mut out = vec![0; entry.size as usize];
                for run in &map.runs {
                    let frame = self.frame(&map.frames[run.frame as usize]).await;
                    let start = run.first_page as usize * PAGE as usize;
                    let end = (start + (run.pages * PAGE) as usize).min(out.len());
                    out[start..end].copy_from_slice(&frame[run.at as usize..][..end - start]);
                }
                out
            }
        }
    }
}
