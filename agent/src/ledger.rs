//! The agent's part of the ledger: what happened is noted here, and told to every location.
//!
//! ```text
//! <state-dir>/ledger/<system>/chain          the writer: the agent's name of then, and this directory's chain
//!                            /<seq>.noted    what happened, fsynced before `note` returns
//!                            /<seq>.sealed   its object, which names the hash of the one before; fsynced before it is stored
//! ```
//!
//! What always holds: what was noted is sealed once and stored at every location, each of which gets the entries in their order
//! and waits for no other. When all have an entry its file goes, but never the last one: the next names its hash. A crash
//! repeats the step that it interrupted: equal bytes under an equal name. Who loses the state directory begins another chain.

use crate::alarms::Alarms;
use crate::durable::{sync_folder, write};
use crate::epochs::Epochs;
use crate::writer::Writer;
use backstay_common::id::{AgentName, LedgerWriter, ObjectId, SystemId};
use backstay_common::ledger::{Entry, Event, NOTHING_BEFORE};
use backstay_common::name::ObjectName;
use backstay_common::seal::{Header, trailer_of};
use backstay_common::{Context, Error, Kind, Result};
use bytes::Bytes;
use std::collections::{BTreeSet, VecDeque};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// One agent's ledger of one system.
#[derive(Debug)]
pub struct Ledger {
    folder: PathBuf,
    system: SystemId,
    /// An agent that was renamed goes on with its chain, under the old name.
    writer: LedgerWriter,
    files: Mutex<Files>,
    /// The last that is noted, and the last that is sealed.
    ends: watch::Sender<Ends>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ends {
    noted: u64,
    sealed: u64,
}

#[derive(Debug)]
struct Files {
    /// What could not be noted yet.
    unwritten: VecDeque<Entry>,
    /// The first that is still here.
    first: u64,
    /// How far each location has been told.
    told: Vec<u64>,
}

impl Ledger {
    /// Takes up the chain of the state directory, or begins one. Blocks.
    pub fn open(
        state_dir: &Path,
        system: SystemId,
        agent: AgentName,
        locations: usize,
    ) -> Result<Ledger> {
        let folder = state_dir.join("ledger").join(system.to_string());
        let doing = || format!("open the ledger {}", folder.display());
        let writer = match std::fs::read_to_string(folder.join("chain")) {
            Ok(text) => text.parse().map_err(|bad| {
                Error::new(Kind::Local, bad)
                    .context(doing())
                    .remedy("stop the agent and move that folder away: another chain begins")
            })?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                LedgerWriter { agent, chain: ObjectId::random() }
            }
            Err(error) => return Err(error).context(doing()),
        };
        let (noted, sealed) = (numbers(&folder, "noted"), numbers(&folder, "sealed"));
        let (noted, sealed) = (noted.context(doing())?, sealed.context(doing())?);
        let last = |numbers: &BTreeSet<u64>| numbers.last().copied().unwrap_or_default();
        for seq in noted.iter().filter(|seq| **seq <= last(&sealed)) {
            remove(&folder.join(format!("{seq:020}.noted")))?;
        }
        let first = sealed.first().copied().unwrap_or(1);
        let ends = Ends { noted: last(&noted).max(last(&sealed)), sealed: last(&sealed) };
        let files = Files { unwritten: VecDeque::new(), first, told: vec![first - 1; locations] };
        let (files, ends) = (Mutex::new(files), watch::Sender::new(ends));
        Ok(Ledger { folder, system, writer, files, ends })
    }

    /// Notes what happened, durably. What cannot be noted now is noted later, if the agent lives so long. Blocks for moments.
    pub fn note(&self, event: Event, subject: impl ToString, detail: impl ToString) -> Result<()> {
        let entry = Entry {
            at: jiff::Timestamp::now().as_millisecond(),
            event: event.word().to_string(),
            subject: subject.to_string(),
            detail: detail.to_string(),
        };
        let mut files = self.files.lock().expect("no panic while held");
        files.unwritten.push_back(entry);
        self.write_notes(&mut files)
    }

    fn write_notes(&self, files: &mut Files) -> Result<()> {
        while let Some(entry) = files.unwritten.front() {
            let text = serde_json::to_vec(entry).map_err(|e| Error::new(Kind::Bug, e))?;
            let seq = self.ends.borrow().noted + 1;
            let path = self.path(seq, "noted");
            let written = self.begin().and_then(|()| write(&path, &text));
            written.context(format!("write {}", path.display()))?;
            files.unwritten.pop_front();
            self.ends.send_modify(|ends| ends.noted = seq);
        }
        Ok(())
    }

    /// Makes the chain's folder, unless it is there.
    fn begin(&self) -> std::io::Result<()> {
        let path = self.folder.join("chain");
        if path.exists() {
            return Ok(());
        }
        std::fs::create_dir_all(&self.folder)?;
        write(&path, self.writer.to_string().as_bytes())?;
        self.folder.ancestors().skip(1).take(2).try_for_each(sync_folder)
    }

    /// Tells every location what is noted, for ever. What goes wrong is an alarm, and tried again. Safe to drop.
    pub async fn tell(&self, writers: &[Arc<Writer>], epochs: &Epochs, alarms: &Alarms) {
        let stores = writers.iter().enumerate();
        let stores = stores.map(|(location, writer)| self.store(location, writer, alarms));
        futures::join!(self.seal(epochs, alarms), futures::future::join_all(stores));
    }

    fn path(&self, seq: u64, state: &str) -> PathBuf {
        self.folder.join(format!("{seq:020}.{state}"))
    }

    fn name(&self, seq: u64) -> ObjectName {
        ObjectName::Ledger { system: self.system, writer: self.writer.clone(), seq }
    }

    fn read(&self, seq: u64, state: &str) -> Result<Vec<u8>> {
        let path = self.path(seq, state);
        std::fs::read(&path).context(format!("read {}", path.display()))
    }

    /// Seals what is noted, in order, as it comes.
    async fn seal(&self, epochs: &Epochs, alarms: &Alarms) {
        let mut ends = self.ends.subscribe();
        loop {
            let is_noted = |ends: &Ends| ends.noted > ends.sealed;
            // What could not be noted is looked after now and then.
            let _ = tokio::time::timeout(RETRY.1, ends.wait_for(is_noted)).await;
            match self.seal_all(epochs).await {
                Ok(()) => alarms.clear("ledger-behind", ""),
                Err(error) => {
                    alarms.raise("ledger-behind", "", &error);
                    tokio::time::sleep(RETRY.1).await;
                }
            }
        }
    }

    async fn seal_all(&self, epochs: &Epochs) -> Result<()> {
        self.write_notes(&mut self.files.lock().expect("no panic while held"))?;
        loop {
            let Ends { noted, sealed } = *self.ends.borrow();
            if noted == sealed {
                return Ok(());
            }
            self.seal_one(epochs, sealed + 1).await?;
            self.ends.send_modify(|ends| ends.sealed = sealed + 1);
        }
    }

    /// Blocks for moments.
    async fn seal_one(&self, epochs: &Epochs, seq: u64) -> Result<()> {
        let epoch = epochs.current().await?;
        let previous = match seq {
            1 => NOTHING_BEFORE,
            _ => trailer_of(&self.read(seq - 1, "sealed")?),
        };
        let entry: Entry = serde_json::from_slice(&self.read(seq, "noted")?).map_err(|e| {
            Error::new(Kind::Corrupt, format!("{}: {e}", self.path(seq, "noted").display()))
        })?;
        let sealed = entry.seal(&epoch, self.system, &self.writer, seq, previous);
        let path = self.path(seq, "sealed");
        write(&path, &sealed.bytes).context(format!("write {}", path.display()))?;
        remove(&self.path(seq, "noted"))
    }

    /// Stores what is sealed at one location, in order, as it comes.
    async fn store(&self, location: usize, writer: &Writer, alarms: &Alarms) {
        let place = writer.location().name().as_str();
        let (mut ends, mut failures) = (self.ends.subscribe(), 0);
        loop {
            let next = self.files.lock().expect("no panic while held").told[location] + 1;
            let is_sealed = |ends: &Ends| ends.sealed >= next;
            if ends.wait_for(is_sealed).await.is_err() {
                return;
            }
            match self.store_one(location, writer, next).await {
                Ok(()) => {
                    failures = 0;
                    alarms.clear("ledger-behind", place);
                }
                Err(error) => {
                    failures += 1;
                    if failures > 1 {
                        alarms.raise("ledger-behind", place, &error);
                    }
                    tokio::time::sleep(crate::wal::backoff(failures, RETRY)).await;
                }
            }
        }
    }

    async fn store_one(&self, location: usize, writer: &Writer, seq: u64) -> Result<()> {
        let (bytes, name) = (Bytes::from(self.read(seq, "sealed")?), self.name(seq));
        let epoch = Header::check(&bytes, &name)?.epoch();
        writer.put(&name, epoch, bytes).await?;
        self.told(location, seq)
    }

    /// A location has an entry. What all have goes, but for the last.
    fn told(&self, location: usize, seq: u64) -> Result<()> {
        let mut files = self.files.lock().expect("no panic while held");
        files.told[location] = seq;
        let everywhere = files.told.iter().copied().min().unwrap_or(seq);
        let last = self.ends.borrow().sealed;
        while files.first <= everywhere && files.first < last {
            remove(&self.path(files.first, "sealed"))?;
            files.first += 1;
        }
        Ok(())
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).context(format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The entries of which there is such a file.
fn numbers(folder: &Path, state: &str) -> std::io::Result<BTreeSet<u64>> {
    let mut numbers = BTreeSet::new();
    let files = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(numbers),
        files => files?,
    };
    for file in files {
        let name = file?.file_name().to_string_lossy().into_owned();
        if let Some((number, of)) = name.split_once('.')
            && let (Ok(number), true) = (number.parse(), of == state)
        {
            numbers.insert(number);
        }
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::snapshot::fixture::{SYSTEM, Store};
    use backstay_common::ledger::{breaks, previous_of};
    use backstay_common::name::folder;
    use std::collections::BTreeMap;

    fn open(dir: &Path) -> Ledger {
        Ledger::open(&dir.join("state"), SYSTEM, "db1".parse().unwrap(), 2).unwrap()
    }

    /// The entries that are still here.
    fn files(ledger: &Ledger, state: &str) -> Vec<u64> {
        numbers(&ledger.folder, state).unwrap().into_iter().collect()
    }

    async fn stored(store: &Store, location: usize) -> BTreeMap<ObjectName, Bytes> {
        let location = store.writers[location].location();
        let mut objects = BTreeMap::new();
        for listed in location.list(&folder::ledger(SYSTEM)).await.unwrap_or_default() {
            let name = listed.name.unwrap();
            objects.insert(name.clone(), location.get(&name).await.unwrap());
        }
        objects
    }

    /// Tells until a location has so many entries.
    async fn tell(ledger: &Ledger, store: &Store, location: usize, count: usize) {
        let alarms = Alarms::default();
        let reached = async {
            while stored(store, location).await.len() < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            () = ledger.tell(&store.writers, &store.epochs, &alarms) => unreachable!(),
            () = reached => {}
        }
    }

    #[tokio::test]
    async fn every_location_gets_the_chain_however_late_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), &["near", "far"]);
        store.init(0).await;
        let ledger = open(dir.path());
        for number in 1..=3 {
            ledger.note(Event::Copied, "near", number).unwrap();
        }
        tell(&ledger, &store, 0, 3).await;
        assert_eq!(files(&ledger, "sealed"), [1, 2, 3], "the other location has none yet");
        // A crash before the note of what is sealed went, and one before an entry was sealed.
        std::fs::write(ledger.path(3, "noted"), b"again").unwrap();
        ledger.note(Event::Gap, "a branch", 4).unwrap();
        drop(ledger);
        store.init(1).await;
        let ledger = open(dir.path());
        assert_eq!(files(&ledger, "noted"), [4]);
        tell(&ledger, &store, 1, 4).await;
        tell(&ledger, &store, 0, 4).await;
        ledger.note(Event::Copied, "far", 5).unwrap();
        tell(&ledger, &store, 0, 5).await;
        tell(&ledger, &store, 1, 5).await;
        assert_eq!(files(&ledger, "sealed"), [5], "the last stays");

        let objects = stored(&store, 0).await;
        assert_eq!(objects, stored(&store, 1).await);
        let epoch = store.epochs.current().await.unwrap();
        let mut chain = Vec::new();
        for ((name, bytes), number) in objects.iter().zip(1..) {
            let opened = Entry::open(bytes.clone(), name, &epoch).unwrap();
            assert_eq!(opened.entry.detail, number.to_string());
            chain.push((number, previous_of(bytes, name).unwrap(), opened.hash));
        }
        assert_eq!(breaks(&chain), [""; 0]);
    }

    #[test]
    fn a_lost_state_directory_begins_another_chain_and_another_name_does_not() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let ledger = open(one.path());
        ledger.note(Event::Gap, "a branch", "").unwrap();
        let renamed = "db2".parse().unwrap();
        let again = Ledger::open(&one.path().join("state"), SYSTEM, renamed, 2).unwrap();
        assert_eq!(again.writer, ledger.writer);
        assert_ne!(open(other.path()).writer, ledger.writer);
    }

    #[test]
    fn what_cannot_be_noted_now_is_noted_later() {
        let dir = tempfile::tempdir().unwrap();
        // No folder can be made there.
        std::fs::write(dir.path().join("state"), b"").unwrap();
        let ledger = Ledger {
            folder: dir.path().join("state/ledger/7"),
            ..open(&dir.path().join("elsewhere"))
        };
        ledger.note(Event::Gap, "a branch", 1).unwrap_err();
        std::fs::remove_file(dir.path().join("state")).unwrap();
        ledger.note(Event::Gap, "a branch", 2).unwrap();
        assert_eq!(files(&ledger, "noted"), [1, 2]);
        let first: Entry = serde_json::from_slice(&ledger.read(1, "noted").unwrap()).unwrap();
        assert_eq!(first.detail, "1");
    }
}
