//! What the clients know of their transactions.

use super::lsn;
use crate::postgres::Session;
use anyhow::{Context, Result};
use backstay_common::lsn::Lsn;
use std::collections::BTreeMap;
use std::time::Instant;

/// A client and its own count of committed transactions, from 1 without a hole.
pub(crate) type Key = (u32, u64);

/// What one transaction wrote into `ledger.entries`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub xid: u64,
    pub ticket: u64,
    pub giver: u32,
    pub taker: u32,
    pub amount: i64,
    /// MD5 of the large value that it stored, empty if it stored none.
    pub blob_digest: String,
    pub made_table: bool,
}

/// One transaction whose COMMIT was sent.
#[derive(Clone, Debug)]
pub struct Transaction {
    pub client: u32,
    pub seq: u64,
    pub entry: Entry,
    /// The commit record starts here or later.
    pub before: Lsn,
    pub outcome: Outcome,
}

#[derive(Clone, Debug)]
pub enum Outcome {
    Acknowledged(Acknowledgement),
    /// The server died over it.
    Unknown,
}

/// What was learnt with the acknowledgement of a commit.
#[derive(Clone, Debug)]
pub struct Acknowledgement {
    /// When COMMIT returned, on this machine's clock.
    pub at: Instant,
    /// False if it never did, and the transaction was found when the server had come back.
    pub returned: bool,
    /// The commit record ends here or earlier; [`Lsn::MAX`] if the server died before it could say.
    pub after: Lsn,
    /// The time in the commit record, microseconds since 1970, if the server could still say.
    pub committed: Option<i64>,
    /// The server's clock after the commit, microseconds since 1970; `i64::MAX` if it couldn't say.
    pub seen: i64,
}

impl Transaction {
    pub fn acknowledged(&self) -> Option<&Acknowledgement> {
        match &self.outcome {
            Outcome::Acknowledged(acknowledgement) => Some(acknowledgement),
            Outcome::Unknown => None,
        }
    }

    pub(crate) fn key(&self) -> Key {
        (self.client, self.seq)
    }
}

/// A named restore point: its record lies between these positions.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub name: String,
    pub before: Lsn,
    pub after: Lsn,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub transactions: Vec<Transaction>,
    pub points: Vec<Point>,
}

impl History {
    /// Forgets all but what a restored server holds.
    pub fn keep_only(&mut self, present: &BTreeMap<Key, Entry>) {
        self.transactions.retain(|t| present.get(&t.key()) == Some(&t.entry));
    }

    /// The newest committed transaction of a client.
    pub fn last_acknowledged(&self, client: u32) -> u64 {
        let own = self.transactions.iter().filter(|t| t.client == client);
        own.filter(|t| t.acknowledged().is_some()).map(|t| t.seq).max().unwrap_or(0)
    }
}

/// A moment of a server that can be asked for.
#[derive(Clone, Debug)]
pub struct Moment {
    /// The server's clock, microseconds since 1970.
    pub micros: i64,
    /// The same in RFC 3339 with microseconds, UTC: what `--to` takes.
    pub rfc3339: String,
    /// The end of the WAL written so far.
    pub lsn: Lsn,
    /// This machine's clock.
    pub at: Instant,
}

impl Moment {
    pub(crate) async fn now(session: &Session) -> Result<Moment> {
        let row = session
            .rows(
                "WITH now AS MATERIALIZED (SELECT clock_timestamp() AS t)
                 SELECT (extract(epoch FROM t) * 1000000)::bigint,
                        to_char(t AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'),
                        pg_current_wal_insert_lsn() FROM now",
            )
            .await?;
        let [micros, rfc3339, position] = row.first().map(Vec::as_slice).unwrap_or_default() else {
            anyhow::bail!("the server tells no time");
        };
        Ok(Moment {
            micros: micros.parse().context("the server's clock")?,
            rfc3339: rfc3339.clone(),
            lsn: lsn(position)?,
            at: Instant::now(),
        })
    }
}
