//! One client of the ledger: writes, notes, reconnects.

use super::history::{Acknowledgement, Entry, History, Outcome, Transaction};
use super::{BLOBS_KEPT, Load, MADE_ROWS, lsn};
use crate::postgres::{Cluster, Session};
use crate::random::Random;
use anyhow::{Context, Result, bail};
use backstay_common::lsn::Lsn;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Notes are kept in memory; a client that has made so many transactions rests.
const TRANSACTIONS_MAX: u64 = 200_000;
/// A server that is down is asked again after this.
const RECONNECT: Duration = Duration::from_millis(100);

pub(super) struct Worker {
    number: u32,
    cluster: crate::postgres::Address,
    load: Load,
    random: Random,
    history: Arc<Mutex<History>>,
    /// The last committed transaction, and the one of them that made the table that stands.
    last: u64,
    made: Option<u64>,
    pending: Option<Transaction>,
}

impl Worker {
    pub fn new(
        number: u32,
        cluster: &Cluster,
        load: Load,
        random: Random,
        history: Arc<Mutex<History>>,
    ) -> Worker {
        let cluster = cluster.address();
        // Left open by a server that died, and then restored or restarted.
        let pending = {
            let mut history = history.lock().unwrap_or_else(PoisonError::into_inner);
            let open = history
                .transactions
                .iter()
                .position(|t| t.client == number && t.acknowledged().is_none());
            open.map(|index| history.transactions.remove(index))
        };
        Worker { number, cluster, load, random, history, last: 0, made: None, pending }
    }

    /// Writes until told to stop.
    pub async fn work(mut self, mut stop: watch::Receiver<bool>) -> Result<()> {
        let outcome = self.work_until(&mut stop).await;
        if let Some(pending) = self.pending.take() {
            self.note(pending);
        }
        outcome
    }

    async fn work_until(&mut self, stop: &mut watch::Receiver<bool>) -> Result<()> {
        let mut session = None;
        while !*stop.borrow_and_update() && self.last < TRANSACTIONS_MAX {
            let pause = match self.step(&mut session).await {
                Ok(()) => self.load.pause,
                Err(error) if passes(&error) => {
                    session = None;
                    RECONNECT
                }
                Err(error) => return Err(error.context(format!("ledger client {}", self.number))),
            };
            let _ = tokio::time::timeout(pause, stop.changed()).await;
        }
        Ok(())
    }

    async fn step(&mut self, session: &mut Option<Session>) -> Result<()> {
        let session = match session {
            Some(session) => session,
            None => {
                let fresh = self.cluster.connect("postgres").await?;
                self.catch_up(&fresh).await?;
                session.insert(fresh)
            }
        };
        let Some(mut transaction) = self.write(session).await? else { return Ok(()) };
        match session.batch_execute("COMMIT").await {
            Ok(()) => {}
            Err(error) => {
                self.pending = Some(transaction);
                return Err(crate::postgres::explain(error));
            }
        }
        let at = Instant::now();
        self.last = transaction.seq;
        if transaction.entry.made_table {
            self.made = Some(transaction.seq);
        }
        let learnt = acknowledgement(session, transaction.entry.xid, at).await;
        transaction.outcome = Outcome::Acknowledged(learnt);
        self.note(transaction);
        Ok(())
    }

    /// Learns from the server where this client stands, and what became of its open transaction.
    async fn catch_up(&mut self, session: &Session) -> Result<()> {
        let row = session
            .rows(&format!(
                "SELECT coalesce(max(seq), 0), max(seq) FILTER (WHERE made_table)
                 FROM ledger.entries WHERE client = {}",
                self.number
            ))
            .await?;
        let row = row.first().context("the ledger's entries")?;
        let last = row[0].parse()?;
        let expected = self.lock().last_acknowledged(self.number);
        if last < expected {
            bail!("the server has lost acknowledged transactions {} to {expected}", last + 1);
        }
        (self.last, self.made) = (last, row[1].parse().ok());
        if let Some(mut pending) = self.pending.take()
            && pending.seq <= last
        {
            let learnt = acknowledgement(session, pending.entry.xid, Instant::now()).await;
            pending.outcome = Outcome::Acknowledged(Acknowledgement { returned: false, ..learnt });
            self.note(pending);
        }
        Ok(())
    }

    /// Does the work of one transaction up to its COMMIT; `None` if it was one that rolls back.
    async fn write(&mut self, session: &Session) -> Result<Option<Transaction>> {
        let seq = self.last + 1;
        let plan = self.plan(seq);
        let rows = session.rows(&plan.statements).await?;
        let (Some(entry), Some(position)) = (rows.first(), rows.last()) else {
            bail!("the ledger's transaction answered nothing");
        };
        if plan.rolls_back {
            session.batch_execute("ROLLBACK").await?;
            return Ok(None);
        }
        let entry = Entry {
            xid: entry[0].parse()?,
            ticket: entry[1].parse()?,
            blob_digest: entry[2].clone(),
            giver: plan.giver,
            taker: plan.taker,
            amount: plan.amount,
            made_table: plan.makes_table,
        };
        let before = lsn(&position[0])?;
        let client = self.number;
        Ok(Some(Transaction { client, seq, entry, before, outcome: Outcome::Unknown }))
    }

    fn plan(&mut self, seq: u64) -> Plan {
        let random = &mut self.random;
        let accounts = u64::from(self.load.accounts);
        let giver = random.below(accounts) as u32 + 1;
        let step = random.range(1..accounts) as u32;
        let mut plan = Plan {
            giver,
            taker: (giver - 1 + step) % self.load.accounts + 1,
            amount: random.range(1..100) as i64,
            makes_table: random.one_in(40),
            rolls_back: random.one_in(15),
            statements: String::new(),
        };
        let blob = random.one_in(8).then(|| {
            let length = random.range(3_000..30_000) as usize;
            random.hex(length)
        });
        let savepoint = random.one_in(10);
        plan.statements = self.statements(seq, &plan, blob.as_deref(), savepoint);
        plan
    }

    /// Rows come back from two of these: the entry's (first) and the position's (last).
    fn statements(&self, seq: u64, plan: &Plan, blob: Option<&str>, savepoint: bool) -> String {
        let Plan { giver, taker, amount, makes_table, .. } = plan;
        let client = self.number;
        let mut sql = String::from("BEGIN;");
        if let Some(body) = blob {
            sql += &format!(
                "INSERT INTO ledger.blobs VALUES ({client}, {seq}, '{body}');
                 DELETE FROM ledger.blobs WHERE client = {client} AND seq NOT IN (
                     SELECT seq FROM ledger.blobs WHERE client = {client}
                     ORDER BY seq DESC LIMIT {BLOBS_KEPT});"
            );
        }
        sql += &format!(
            "INSERT INTO ledger.entries VALUES ({client}, {seq},
                 pg_current_xact_id()::text::bigint, nextval('ledger.tickets'),
                 {giver}, {taker}, {amount},
                 (SELECT md5(body) FROM ledger.blobs WHERE client = {client} AND seq = {seq}),
                 {makes_table})
             RETURNING xid, ticket, blob_digest;"
        );
        if savepoint {
            sql += &format!(
                "SAVEPOINT undone;
                 INSERT INTO ledger.entries VALUES (-{client}, {seq}, 0, -{seq} * 1000 - {client}, 1, 2, 0, NULL, false);
                 ROLLBACK TO undone;"
            );
        }
        if *makes_table {
            sql += &format!(
                "CREATE TABLE ledger.made_{client}_{seq} AS
                     SELECT n, md5(n::text) AS m FROM generate_series(1, {MADE_ROWS}) n;
                 CREATE INDEX ON ledger.made_{client}_{seq} (m);"
            );
            if let Some(old) = self.made {
                sql += &format!("DROP TABLE ledger.made_{client}_{old};");
            }
        }
        // In the order of the accounts, so that two clients never wait for each other in a ring.
        let mut moves = [(giver, -amount), (taker, *amount)];
        moves.sort();
        for (account, change) in moves {
            sql += &format!(
                "UPDATE ledger.accounts SET balance = balance + {change} WHERE id = {account};"
            );
        }
        sql + "SELECT pg_current_wal_insert_lsn()"
    }

    fn note(&self, transaction: Transaction) {
        self.lock().transactions.push(transaction);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Plan {
    giver: u32,
    taker: u32,
    amount: i64,
    makes_table: bool,
    rolls_back: bool,
    statements: String,
}

/// Bounds of a commit that has returned. If the server dies now, they stay open.
async fn acknowledgement(session: &Session, xid: u64, at: Instant) -> Acknowledgement {
    let open =
        Acknowledgement { at, returned: true, after: Lsn::MAX, committed: None, seen: i64::MAX };
    let query = format!(
        "SELECT pg_current_wal_flush_lsn(), (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
                (extract(epoch FROM pg_xact_commit_timestamp('{}'::xid)) * 1000000)::bigint",
        xid as u32
    );
    let Ok(rows) = session.rows(&query).await else { return open };
    let known = rows.first().and_then(|row| {
        let (after, seen, committed) = (lsn(&row[0]).ok()?, row[1].parse().ok()?, row[2].parse());
        Some(Acknowledgement { at, returned: true, after, committed: committed.ok(), seen })
    });
    known.unwrap_or(open)
}

/// Whether an error comes with servers that stop, start, stand by or are full of clients: try again.
fn passes(error: &anyhow::Error) -> bool {
    let server = error.chain().find_map(|cause| cause.downcast_ref::<tokio_postgres::Error>());
    match server.map(|error| error.code().map(|code| code.code())) {
        None => false,
        Some(None) => true,
        Some(Some(code)) => ["08", "40", "53", "57"].contains(&&code[..2]) || code == "25006",
    }
}
