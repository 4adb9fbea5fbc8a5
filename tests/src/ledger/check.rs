//! Judging a restored server against the history.

use super::history::{Entry, History, Key, Transaction};
use super::{BLOBS_KEPT, MADE_ROWS, OPENING_BALANCE, Target};
use crate::postgres::Session;
use anyhow::{Context, Result, bail};
use backstay_common::lsn::Lsn;
use std::collections::BTreeMap;

/// Of so many faults each is told; of the rest, only the number.
const FAULTS_TOLD: usize = 20;

/// What a server that passed the check holds.
#[derive(Clone, Debug)]
pub struct Report {
    pub present: usize,
    /// Acknowledged by the original, not in this server, and the target allows it.
    pub left_out: usize,
    /// The commit records of all that is present start before or not far behind this.
    pub newest: Lsn,
}

pub(super) async fn check(
    history: &History,
    accounts: u32,
    restored: &Session,
    target: &Target,
) -> Result<Report> {
    restored.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let outcome = check_in_snapshot(history, accounts, restored, target).await;
    restored.batch_execute("ROLLBACK").await?;
    outcome
}

async fn check_in_snapshot(
    history: &History,
    accounts: u32,
    restored: &Session,
    target: &Target,
) -> Result<Report> {
    let bounds = Bounds::of(target, history)?;
    let present = read_entries(restored).await?;
    let mut faults = judge(history, &present, &bounds);
    faults.extend(balances(restored, accounts, &present).await?);
    faults.extend(blobs(restored, &present).await?);
    faults.extend(made_tables(restored, &present).await?);
    faults.extend(tickets(restored, &present).await?);
    if !faults.is_empty() {
        let told: Vec<_> = faults.iter().take(FAULTS_TOLD).map(String::as_str).collect();
        bail!("{} faults for {target:?}:\n  {}", faults.len(), told.join("\n  "));
    }
    let here = |t: &&Transaction| present.contains_key(&t.key());
    let (inside, outside): (Vec<_>, Vec<_>) = history.transactions.iter().partition(here);
    let left_out = outside.iter().filter(|t| t.acknowledged().is_some()).count();
    let newest = inside.iter().map(|t| t.before).max().unwrap_or_default();
    Ok(Report { present: present.len(), left_out, newest })
}

pub(super) async fn read_entries(session: &Session) -> Result<BTreeMap<Key, Entry>> {
    let rows = session
        .rows(
            "SELECT client, seq, xid, ticket, giver, taker, amount, blob_digest, made_table
             FROM ledger.entries",
        )
        .await?;
    rows.iter().map(|row| parse_entry(row).with_context(|| format!("entry {row:?}"))).collect()
}

fn parse_entry(row: &[String]) -> Result<(Key, Entry)> {
    let entry = Entry {
        xid: row[2].parse()?,
        ticket: row[3].parse()?,
        giver: row[4].parse()?,
        taker: row[5].parse()?,
        amount: row[6].parse()?,
        blob_digest: row[7].clone(),
        made_table: row[8] == "t",
    };
    Ok(((row[0].parse()?, row[1].parse()?), entry))
}

/// What a target says of transactions.
struct Bounds {
    must: Box<dyn Fn(&Transaction) -> bool + Send>,
    must_not: Box<dyn Fn(&Transaction) -> bool + Send>,
}

impl Bounds {
    fn of(target: &Target, history: &History) -> Result<Bounds> {
        Ok(match target {
            Target::All => Bounds::at_least(|t| t.acknowledged().is_some()),
            Target::Lsn(lsn) => Bounds::between(*lsn, lsn.add(1)),
            Target::Snapshot { stop } => {
                let stop = *stop;
                Bounds::at_least(move |t| ended_by(t, stop))
            }
            Target::Latest { acknowledged_until } => {
                let until = *acknowledged_until;
                Bounds::at_least(move |t| {
                    t.acknowledged().is_some_and(|a| a.returned && a.at <= until)
                })
            }
            Target::Time(micros) => Bounds::at_time(*micros),
            Target::Name(name) => {
                let point = history.points.iter().rfind(|point| point.name == *name);
                let point = point.with_context(|| format!("no restore point {name}"))?;
                Bounds::between(point.before, point.after)
            }
            Target::Xid(xid) => Bounds::at_xid(*xid, history)?,
        })
    }

    fn at_least(must: impl Fn(&Transaction) -> bool + Send + 'static) -> Bounds {
        Bounds { must: Box::new(must), must_not: Box::new(|_| false) }
    }

    /// All that ended by `through`, nothing that started at `from` or later.
    fn between(through: Lsn, from: Lsn) -> Bounds {
        Bounds {
            must: Box::new(move |t| ended_by(t, through)),
            must_not: Box::new(move |t| t.before >= from),
        }
    }

    /// The time in a commit record is taken before the record gets its place. So what the server had
    /// acknowledged by then precedes every record with a later time, while of those with an earlier time that
    /// were still under way, some may come behind the first later one.
    fn at_time(micros: i64) -> Bounds {
        Bounds {
            must: Box::new(move |t| t.acknowledged().is_some_and(|a| a.seen <= micros)),
            must_not: Box::new(move |t| {
                t.acknowledged().and_then(|a| a.committed).is_some_and(|time| time > micros)
            }),
        }
    }

    fn at_xid(xid: u64, history: &History) -> Result<Bounds> {
        let last = history.transactions.iter().rfind(|t| t.entry.xid == xid);
        let last = last.with_context(|| format!("transaction {xid} isn't the ledger's"))?;
        let after = last.acknowledged().map_or(Lsn::MAX, |a| a.after);
        let before = last.before;
        Ok(Bounds {
            must: Box::new(move |t| t.entry.xid == xid || ended_by(t, before)),
            must_not: Box::new(move |t| t.entry.xid != xid && t.before >= after),
        })
    }
}

fn ended_by(transaction: &Transaction, position: Lsn) -> bool {
    transaction.acknowledged().is_some_and(|a| a.after <= position)
}

fn judge(history: &History, present: &BTreeMap<Key, Entry>, bounds: &Bounds) -> Vec<String> {
    let known: BTreeMap<Key, &Transaction> =
        history.transactions.iter().map(|t| (t.key(), t)).collect();
    let mut faults = holes(present);
    for (key, entry) in present {
        match known.get(key) {
            None => faults.push(format!("{key:?} is here, and was never committed")),
            Some(t) if t.entry != *entry => {
                faults.push(format!("{key:?} is {entry:?}, and was {:?}", t.entry));
            }
            Some(t) if (bounds.must_not)(t) => faults.push(format!("must not be here: {t:?}")),
            Some(_) => {}
        }
    }
    let newest = present.keys().filter_map(|key| known.get(key)).map(|t| t.before).max();
    for t in history.transactions.iter().filter(|t| !present.contains_key(&t.key())) {
        if (bounds.must)(t) {
            faults.push(format!("must be here: {t:?}"));
        } else if newest.is_some_and(|newest| ended_by(t, newest)) {
            faults.push(format!("something later is here, and this is not: {t:?}"));
        }
    }
    faults
}

/// Each client counts from 1.
fn holes(present: &BTreeMap<Key, Entry>) -> Vec<String> {
    let mut expected: BTreeMap<u32, u64> = BTreeMap::new();
    let mut faults = Vec::new();
    for (client, seq) in present.keys() {
        let next = expected.entry(*client).or_insert(1);
        if seq != next {
            faults.push(format!("client {client}: {seq} follows {}", *next - 1));
        }
        *next = seq + 1;
    }
    faults
}

async fn balances(
    session: &Session,
    accounts: u32,
    present: &BTreeMap<Key, Entry>,
) -> Result<Vec<String>> {
    let mut expected: BTreeMap<u32, i64> = (1..=accounts).map(|id| (id, OPENING_BALANCE)).collect();
    for entry in present.values() {
        *expected.entry(entry.giver).or_default() -= entry.amount;
        *expected.entry(entry.taker).or_default() += entry.amount;
    }
    let mut actual = BTreeMap::new();
    for row in session.rows("SELECT id, balance FROM ledger.accounts").await? {
        actual.insert(row[0].parse::<u32>()?, row[1].parse::<i64>()?);
    }
    let sum: i64 = actual.values().sum();
    let mut faults = Vec::new();
    if sum != i64::from(accounts) * OPENING_BALANCE {
        faults.push(format!("the accounts sum up to {sum}"));
    }
    for id in expected.keys().chain(actual.keys().filter(|id| !expected.contains_key(id))) {
        let (should, is) = (expected.get(id), actual.get(id));
        if should != is {
            faults.push(format!("account {id} holds {is:?}, its entries say {should:?}"));
        }
    }
    Ok(faults)
}

async fn blobs(session: &Session, present: &BTreeMap<Key, Entry>) -> Result<Vec<String>> {
    let mut by_client: BTreeMap<u32, Vec<(u64, &str)>> = BTreeMap::new();
    for ((client, seq), entry) in present.iter().filter(|(_, entry)| !entry.blob_digest.is_empty())
    {
        by_client.entry(*client).or_default().push((*seq, &entry.blob_digest));
    }
    let newest = |(client, blobs): (u32, Vec<(u64, &str)>)| {
        let kept = blobs.into_iter().rev().take(BLOBS_KEPT);
        kept.map(move |(seq, digest)| ((client, seq), digest.to_owned())).collect::<Vec<_>>()
    };
    let expected: BTreeMap<Key, String> = by_client.into_iter().flat_map(newest).collect();
    let mut actual = BTreeMap::new();
    for row in session.rows("SELECT client, seq, md5(body) FROM ledger.blobs").await? {
        actual.insert((row[0].parse()?, row[1].parse()?), row[2].clone());
    }
    Ok(differences("large value", &expected, &actual))
}

async fn made_tables(session: &Session, present: &BTreeMap<Key, Entry>) -> Result<Vec<String>> {
    let mut newest: BTreeMap<u32, u64> = BTreeMap::new();
    for ((client, seq), _) in present.iter().filter(|(_, entry)| entry.made_table) {
        newest.insert(*client, *seq);
    }
    let expected: BTreeMap<String, String> = newest
        .iter()
        .map(|(client, seq)| (format!("made_{client}_{seq}"), MADE_ROWS.to_string()))
        .collect();
    let names = session
        .rows(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'ledger' AND tablename ~ '^made_'",
        )
        .await?;
    let mut actual = BTreeMap::new();
    for name in names.into_iter().flatten() {
        let rows = session.value(&format!("SELECT count(*) FROM ledger.{name}")).await?;
        actual.insert(name, rows);
    }
    Ok(differences("table", &expected, &actual))
}

/// A sequence may be ahead of its newest use, never behind.
async fn tickets(session: &Session, present: &BTreeMap<Key, Entry>) -> Result<Vec<String>> {
    let last: u64 = session.value("SELECT last_value FROM ledger.tickets").await?.parse()?;
    let used = present.values().map(|entry| entry.ticket).max().unwrap_or(0);
    Ok(if last < used { vec![format!("sequence at {last}, {used} was drawn")] } else { vec![] })
}

fn differences<K: Ord + std::fmt::Debug>(
    what: &str,
    expected: &BTreeMap<K, String>,
    actual: &BTreeMap<K, String>,
) -> Vec<String> {
    let missing = expected.iter().filter(|(key, value)| actual.get(key) != Some(value));
    let extra = actual.iter().filter(|(key, _)| !expected.contains_key(key));
    missing
        .map(|(key, value)| format!("{what} {key:?}: {:?} and not {value}", actual.get(key)))
        .chain(extra.map(|(key, _)| format!("{what} {key:?} should not be here")))
        .collect()
}
