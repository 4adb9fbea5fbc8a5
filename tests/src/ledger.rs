//! A workload that knows what it did, so that a restored server can be judged to the transaction.
//!
//! Several clients write at once: money moves between accounts, large values come and go, tables are
//! made and dropped, some transactions roll back. Each committed transaction leaves one row in
//! `ledger.entries`, and a note on this side: from which WAL position on its commit record can start, and
//! up to where and when the server had acknowledged it. From these bounds alone [`Ledger::check`] says for any
//! [`Target`] what must and what must not be there; where the bounds leave it open, either is right, but the
//! order of commits must hold.
//!
//! Clients survive the death of the server: they reconnect, and find out what became of the
//! transaction whose COMMIT was never answered.

mod check;
mod client;
mod history;

pub use check::Report;
pub use history::{Acknowledgement, Entry, Moment, Outcome, Transaction};

use crate::postgres::{Cluster, Session};
use crate::random::Random;
use anyhow::{Context, Result};
use backstay_common::lsn::Lsn;
use history::{History, Point};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Every account starts with this.
pub(crate) const OPENING_BALANCE: i64 = 1000;
/// Each client keeps this many of its newest large values.
pub(crate) const BLOBS_KEPT: usize = 5;
/// Rows in each table that a client makes.
pub(crate) const MADE_ROWS: u64 = 50;

/// How hard the ledger works.
#[derive(Clone, Debug)]
pub struct Load {
    pub clients: u32,
    /// At least two.
    pub accounts: u32,
    /// Between two transactions of one client.
    pub pause: Duration,
}

impl Default for Load {
    fn default() -> Load {
        Load { clients: 4, accounts: 100, pause: Duration::from_millis(2) }
    }
}

/// The moment that a server is said to have been restored to.
#[derive(Clone, Debug)]
pub enum Target {
    /// Everything that was ever acknowledged.
    All,
    /// All that had ended at this position, nothing that began after it.
    Lsn(Lsn),
    /// The state at this instant of the server's clock, in microseconds since 1970.
    Time(i64),
    /// Up to this transaction, and it too.
    Xid(u64),
    /// A restore point made with [`Ledger::restore_point`].
    Name(String),
    /// As much as there was: at least all whose COMMIT had returned by then, on this machine's clock.
    Latest { acknowledged_until: Instant },
    /// A snapshot that ended there: at least all that had ended by then.
    Snapshot { stop: Lsn },
}

/// The ledger of one cluster, and of whatever is restored from it.
#[derive(Debug)]
pub struct Ledger {
    load: Load,
    random: Random,
    history: Arc<Mutex<History>>,
    stop: watch::Sender<bool>,
    clients: Vec<JoinHandle<Result<()>>>,
}

impl Ledger {
    /// Makes schema `ledger` in database `postgres`. Nobody writes yet.
    pub async fn create(cluster: &Cluster, load: Load, random: Random) -> Result<Ledger> {
        anyhow::ensure!(load.accounts >= 2 && load.clients >= 1, "too little for a ledger");
        cluster.sql(&schema(load.accounts)).await.context("make the ledger")?;
        Ok(Ledger::found(load, random))
    }

    /// The ledger of a copy of a cluster in which [`Ledger::create`] made one of this load, and nobody has written.
    pub fn found(load: Load, random: Random) -> Ledger {
        let history = Arc::new(Mutex::new(History::default()));
        let stop = watch::Sender::new(false);
        Ledger { load, random, history, stop, clients: Vec::new() }
    }

    /// Sets the clients to work on a cluster, until [`Ledger::stop`].
    pub fn start(&mut self, cluster: &Cluster) {
        self.stop.send_replace(false);
        for number in 1..=self.load.clients {
            let client = client::Worker::new(
                number,
                cluster,
                self.load.clone(),
                Random::from_seed(self.random.next()),
                self.history.clone(),
            );
            self.clients.push(tokio::spawn(client.work(self.stop.subscribe())));
        }
    }

    /// Lets every client finish its transaction. An error is one that no server should have given.
    /// If the server is gone, the last transaction of each client may stay of unknown outcome.
    pub async fn stop(&mut self) -> Result<()> {
        self.stop.send_replace(true);
        for client in std::mem::take(&mut self.clients) {
            client.await.context("a client of the ledger panicked")??;
        }
        Ok(())
    }

    pub async fn run_for(&mut self, cluster: &Cluster, duration: Duration) -> Result<()> {
        self.start(cluster);
        tokio::time::sleep(duration).await;
        self.stop().await
    }

    /// The ledger of a server restored to an earlier moment: it knows only what that server holds, and
    /// goes on from there. This one keeps the original's history. Check first.
    pub async fn forked(&self, restored: &Session, random: Random) -> Result<Ledger> {
        let present = check::read_entries(restored).await?;
        let mut history = self.lock().clone();
        history.keep_only(&present);
        let history = Arc::new(Mutex::new(history));
        let stop = watch::Sender::new(false);
        Ok(Ledger { load: self.load.clone(), random, history, stop, clients: Vec::new() })
    }

    /// The server's clock and position now, as targets want them.
    pub async fn moment(&self, session: &Session) -> Result<Moment> {
        Moment::now(session).await
    }

    /// Makes a restore point for [`Target::Name`]; names are not used twice.
    pub async fn restore_point(&self, session: &Session, name: &str) -> Result<Lsn> {
        let before = lsn(&session.value("SELECT pg_current_wal_insert_lsn()").await?)?;
        let after =
            lsn(&session.value(&format!("SELECT pg_create_restore_point('{name}')")).await?)?;
        self.lock().points.push(Point { name: name.to_owned(), before, after });
        Ok(after)
    }

    /// All transactions so far whose COMMIT was sent, in the order in which their outcome was learnt.
    pub fn transactions(&self) -> Vec<Transaction> {
        self.lock().transactions.clone()
    }

    /// How many commits were acknowledged so far.
    pub fn acknowledged(&self) -> usize {
        self.lock().transactions.iter().filter(|t| t.acknowledged().is_some()).count()
    }

    /// The newest acknowledged commit.
    pub fn last_acknowledged(&self) -> Option<Transaction> {
        let history = self.lock();
        let known = history.transactions.iter().filter(|t| t.acknowledged().is_some());
        known.max_by_key(|t| t.acknowledged().map(|a| a.at)).cloned()
    }

    /// Waits until so many commits more have been acknowledged.
    pub async fn wait_for(&self, more: usize, patience: Duration) -> Result<()> {
        let (goal, deadline) = (self.acknowledged() + more, Instant::now() + patience);
        while self.acknowledged() < goal {
            anyhow::ensure!(
                Instant::now() < deadline,
                "no {more} more transactions in {patience:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Whether a server (primary or in recovery) is in the state that the target asks for. The error lists
    /// what is wrong. Stop the clients before, if they write to this very server.
    pub async fn check(&self, restored: &Session, target: &Target) -> Result<Report> {
        let history = self.lock().clone();
        check::check(&history, self.load.accounts, restored, target).await
    }

    fn lock(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn lsn(text: &str) -> Result<Lsn> {
    text.parse().map_err(|_| anyhow::anyhow!("not a WAL position: {text:?}"))
}

fn schema(accounts: u32) -> String {
    format!(
        "CREATE SCHEMA ledger;
         CREATE SEQUENCE ledger.tickets;
         CREATE TABLE ledger.accounts (id int PRIMARY KEY, balance bigint NOT NULL);
         INSERT INTO ledger.accounts SELECT n, {OPENING_BALANCE} FROM generate_series(1, {accounts}) n;
         CREATE TABLE ledger.entries (
             client int, seq bigint, xid bigint NOT NULL, ticket bigint NOT NULL UNIQUE,
             giver int NOT NULL, taker int NOT NULL, amount bigint NOT NULL,
             blob_digest text, made_table bool NOT NULL,
             PRIMARY KEY (client, seq));
         CREATE TABLE ledger.blobs (
             client int, seq bigint, body text NOT NULL, PRIMARY KEY (client, seq));
         ALTER TABLE ledger.blobs ALTER body SET STORAGE EXTERNAL;"
    )
}
