//! Snapshots under mixed DDL: each of them, and moments between, restores to exactly what was there.
//!
//! Beside the ledger's load, deeds are dealt from a shuffled deck: everything that gives files new names, new sizes, or
//! other content under an old name. Some are done while a snapshot is being taken. After each statement the state of all that
//! the deeds write to is noted, and a restored server must be in the state of its moment; a snapshot, in one of those that
//! were while it was taken.

use crate::base_backup::{ROLE, over_the_network};
use crate::site::{PATIENCE, Site, configuration};
use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::{Cluster, Session};
use backstay_tests::random::Random;
use backstay_tests::scene::{Scene, full};
use futures::{StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Restored servers that are judged at one time.
const JUDGED_AT_ONCE: usize = 2;

/// How much is done.
struct Extent {
    snapshots: usize,
    /// Between one snapshot and the next.
    moments: usize,
    /// Before each snapshot, and the same again while it is taken.
    deeds: usize,
}

impl Extent {
    /// In the fast suite each deed is done once at least.
    fn get() -> Extent {
        match full() {
            true => Extent { snapshots: 12, moments: 3, deeds: 3 },
            false => Extent { snapshots: 3, moments: 1, deeds: 3 },
        }
    }
}

/// With the data directory.
async fn under_all_ddl(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = configuration(scene, &cluster)?;
    let site = Site::of(scene, cluster, configuration).await?;
    Play::begin(site).await?.run_to_end().await
}
on_drawn_major!(under_all_ddl);

/// Without it: both grammars of `BASE_BACKUP`.
async fn under_all_ddl_over_the_network(scene: &Scene, major: Major) -> Result<()> {
    let cluster = Cluster::build(scene, &major).start().await?;
    cluster.sql(ROLE).await?;
    let configuration = over_the_network(scene, &cluster)?;
    let site = Site::of(scene, cluster, configuration).await?;
    Play::begin(site).await?.run_to_end().await
}
mod under_all_ddl_over_the_network_on {
    backstay_tests::on_each_major!(@ under_all_ddl_over_the_network pg14 14, pg18 18);
}

/// A digest of every table that only deeds write to, by database, and the databases.
type State = BTreeMap<String, String>;

/// What is restored, and what must be found.
struct Case {
    to: String,
    target: Target,
    /// Of the noted states, those that are right.
    states: RangeInclusive<usize>,
}

struct Play<'s> {
    site: Site<'s>,
    /// Whose temporary table is there all the time.
    _guest: Session,
    random: Random,
    deck: Vec<Deed>,
    /// Every state that there was, in order.
    states: Vec<State>,
    cases: Vec<Case>,
    /// How many deeds were done, so that no two are the same.
    done: usize,
}

impl<'s> Play<'s> {
    async fn begin(site: Site<'s>) -> Result<Play<'s>> {
        let space = site.scene.folder("space")?.display().to_string();
        site.cluster.sql(&format!("CREATE TABLESPACE space LOCATION '{space}'")).await?;
        for statement in PREPARATION {
            site.cluster.sql(statement).await.with_context(|| (*statement).to_owned())?;
        }
        let goods = "CREATE TABLE goods AS SELECT n AS id, md5(n::text) AS t FROM generate_series(1, 900) n";
        site.cluster.connect_to("stock").await?.batch_execute(goods).await?;
        let guest = site.cluster.connect().await?;
        guest.batch_execute(TEMPORARY).await?;
        let random = site.scene.random();
        let states = vec![state(&site.cluster).await?];
        Ok(Play {
            site,
            _guest: guest,
            random,
            deck: Vec::new(),
            states,
            cases: Vec::new(),
            done: 0,
        })
    }

    async fn run_to_end(mut self) -> Result<()> {
        let extent = Extent::get();
        for snapshot in 0..extent.snapshots {
            let moments = if snapshot > 0 { extent.moments } else { 0 };
            for number in 0..extent.deeds.max(moments) {
                if number < extent.deeds {
                    self.deed().await?;
                }
                if number < moments {
                    self.moment().await?;
                }
            }
            self.snapshot(extent.deeds).await.with_context(|| format!("snapshot {snapshot}"))?;
        }
        self.site.ledger.wait_for(20, PATIENCE).await?;
        self.site.ledger.stop().await?;
        self.site.all_stored().await?;
        let last = self.states.len() - 1;
        let all = Case { to: "latest".to_owned(), target: Target::All, states: last..=last };
        self.cases.push(all);
        let expected = extent.snapshots + (extent.snapshots - 1) * extent.moments + 1;
        ensure!(self.cases.len() == expected, "{} cases, not {expected}", self.cases.len());
        let judged = self.cases.iter().enumerate().map(|(number, case)| self.reach(number, case));
        futures::stream::iter(judged).buffer_unordered(JUDGED_AT_ONCE).try_collect().await
    }

    /// The next of the deck, statement by statement.
    async fn deed(&mut self) -> Result<()> {
        if self.deck.is_empty() {
            self.deck = DEEDS.to_vec();
            self.random.shuffle(&mut self.deck);
        }
        let deed = self.deck.pop().context("a deck")?;
        self.done += 1;
        for statement in deed(self.done) {
            let (database, statement) = match statement.split_once(": ") {
                Some((database @ "stock", statement)) => (database, statement),
                _ => ("postgres", statement.as_str()),
            };
            // CREATE DATABASE has no strategies before 15, and knows only one.
            let statement = match self.site.major().number() {
                ..15 => statement.split(" STRATEGY").next().unwrap_or(statement),
                _ => statement,
            };
            let session = self.site.cluster.connect_to(database).await?;
            let said = session.batch_execute(statement).await;
            said.with_context(|| format!("{database}: {statement}"))?;
            self.states.push(state(&self.site.cluster).await?);
        }
        Ok(())
    }

    /// Notes a moment, in one of the ways in which it can be asked for.
    async fn moment(&mut self) -> Result<()> {
        let session = self.site.cluster.connect().await?;
        let ledger = &self.site.ledger;
        let now = self.states.len() - 1;
        let some = self.random.range(2..12) as usize;
        ledger.wait_for(some, PATIENCE).await?;
        let (to, target) = match self.random.below(3) {
            0 => {
                let moment = ledger.moment(&session).await?;
                (moment.rfc3339, Target::Time(moment.micros))
            }
            1 => {
                let moment = ledger.moment(&session).await?;
                (format!("lsn:{}", moment.lsn), Target::Lsn(moment.lsn))
            }
            _ => {
                let name = format!("point-{}", self.cases.len());
                ledger.restore_point(&session, &name).await?;
                (format!("name:{name}"), Target::Name(name))
            }
        };
        // Something comes after it, and the next deed's commit is of a later microsecond.
        ledger.wait_for(2, PATIENCE).await?;
        self.cases.push(Case { to, target, states: now..=now });
        Ok(())
    }

    /// Takes a snapshot, and does deeds meanwhile.
    async fn snapshot(&mut self, deeds: usize) -> Result<()> {
        let session = self.site.cluster.connect().await?;
        self.site.ledger.wait_for(20, PATIENCE).await?;
        let before = self.site.ledger.moment(&session).await?;
        let first = self.states.len() - 1;
        let deployment = self.site.deployment.clone();
        let taking =
            tokio::spawn(async move { deployment.agent_command(&["snapshot", "--json"]).await });
        for _ in 0..deeds {
            self.deed().await?;
        }
        let taken = taking.await??.success()?.json()?;
        let bytes = |name: &str| taken[name].as_u64().with_context(|| format!("{name}: {taken}"));
        ensure!(taken["parent"].is_string(), "compared with nothing: {taken}");
        ensure!(bytes("stored_bytes")? < bytes("database_bytes")? / 2, "{taken}");
        ensure!(bytes("corrupt_pages")? == 0, "{taken}");
        let to = format!("snapshot:{}", taken["id"].as_str().context("id")?);
        let target = Target::Snapshot { stop: before.lsn };
        self.cases.push(Case { to, target, states: first..=self.states.len() - 1 });
        Ok(())
    }

    async fn reach(&self, number: usize, case: &Case) -> Result<()> {
        let name = format!("r{number}");
        let reached = async {
            let (mut restored, _) = self.site.restore_and_start(&name, &case.to, &[]).await?;
            let found = state(&restored).await?;
            self.is_right(&found, case)?;
            let _: Lsn = self.site.judge(&restored, &case.target).await?;
            restored.destroy()
        };
        reached.await.with_context(|| format!("--to {}", case.to))
    }

    fn is_right(&self, found: &State, case: &Case) -> Result<()> {
        let right = &self.states[case.states.clone()];
        let nearest = right.iter().min_by_key(|state| differing(state, found).len());
        let wrong = nearest.map(|state| differing(state, found)).context("a state")?;
        ensure!(wrong.is_empty(), "of {} states the nearest differs in {wrong:#?}", right.len());
        Ok(())
    }
}

/// What is not the same: expected, and found.
fn differing(expected: &State, found: &State) -> Vec<(String, Option<String>, Option<String>)> {
    let names: std::collections::BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    let pair =
        |name: &String| (name.clone(), expected.get(name).cloned(), found.get(name).cloned());
    names.into_iter().map(pair).filter(|(_, expected, found)| expected != found).collect()
}

/// All tables that only deeds write to. Of an unlogged or temporary one nothing is left after recovery.
async fn state(cluster: &Cluster) -> Result<State> {
    let mut state = State::new();
    let session = cluster.connect().await?;
    // -2: DROP DATABASE has begun, and cannot be undone.
    let databases = "SELECT datname FROM pg_database \
                     WHERE NOT datistemplate AND datconnlimit <> -2 ORDER BY 1";
    for database in session.rows(databases).await?.into_iter().flatten() {
        let session = cluster.connect_to(&database).await?;
        let tables = "SELECT relname FROM pg_class WHERE relkind IN ('r', 'm') AND relpersistence = 'p' \
                      AND relnamespace = 'public'::regnamespace";
        let tables = session.rows(tables).await?.into_iter().flatten();
        let digests = tables.map(|table| {
            format!(
                "SELECT '{table}', count(*) || ' ' || coalesce(md5(string_agg(id || t, ',' ORDER BY id, t)), '') \
                 FROM {table}"
            )
        });
        let digests = digests.collect::<Vec<String>>().join(" UNION ALL ");
        let digests = if digests.is_empty() { Vec::new() } else { session.rows(&digests).await? };
        state.insert(database.clone(), "is there".to_owned());
        state.extend(
            digests.into_iter().map(|row| (format!("{database}.{}", row[0]), row[1].clone())),
        );
    }
    Ok(state)
}

const PREPARATION: &[&str] = &[
    "CREATE TABLE mixed AS SELECT n AS id, md5(n::text) AS t FROM generate_series(1, 20000) n",
    "ALTER TABLE mixed ADD PRIMARY KEY (id)",
    "CREATE INDEX mixed_t ON mixed (t)",
    "CREATE INDEX mixed_hash ON mixed USING hash (t)",
    "CREATE INDEX mixed_brin ON mixed USING brin (id)",
    "CREATE MATERIALIZED VIEW seen AS SELECT id, t FROM mixed WHERE id % 10 = 0",
    "CREATE TABLE moved AS SELECT n AS id, repeat('m', 50) AS t FROM generate_series(1, 6000) n",
    "CREATE TABLE dropped AS SELECT n AS id, repeat('d', 50) AS t FROM generate_series(1, 6000) n",
    "CREATE TABLE shrinks AS SELECT n AS id, repeat('s', 90) AS t FROM generate_series(1, 9000) n",
    "CREATE TABLE refilled AS SELECT n AS id, repeat('r', 90) AS t FROM generate_series(1, 9000) n",
    "CREATE TABLE wide AS SELECT n AS id, (SELECT string_agg(md5((n * k)::text), '') FROM generate_series(1, 200) k) AS t \
     FROM generate_series(1, 200) n",
    "CREATE UNLOGGED TABLE volatile AS SELECT n AS id, 'x' AS t FROM generate_series(1, 3000) n",
    "CREATE INDEX volatile_id ON volatile (id)",
    "CREATE DATABASE stock",
    "CHECKPOINT",
];

const TEMPORARY: &str = "
    CREATE TEMPORARY TABLE passing AS SELECT n AS id, md5(n::text) AS t FROM generate_series(1, 4000) n;
    CREATE INDEX ON passing (t);";

/// One change, as statements that commit one by one; `n` makes each time another. "stock: " before one: in that database.
type Deed = fn(usize) -> Vec<String>;

/// Each can follow any other.
const DEEDS: [Deed; 18] = [
    |n| vec![format!("UPDATE mixed SET t = md5(t || {n}) WHERE id % 97 = {n} % 97")],
    |_| vec!["VACUUM FULL mixed".into()],
    |_| vec!["CLUSTER mixed USING mixed_t".into()],
    |_| vec!["REINDEX TABLE mixed".into(), "VACUUM (FREEZE) mixed".into()],
    |n| vec![format!("UPDATE wide SET t = t || {n} WHERE id % 9 = {n} % 9")],
    |_| vec!["REFRESH MATERIALIZED VIEW seen".into()],
    |_| vec!["ALTER TABLE moved SET TABLESPACE space".into()],
    |n| {
        vec![
            "ALTER TABLE moved SET TABLESPACE pg_default".into(),
            format!("UPDATE moved SET t = t || {n} WHERE id % 50 = 1"),
        ]
    },
    |n| {
        vec![
            "DROP TABLE dropped".into(),
            format!(
                "CREATE TABLE dropped AS SELECT n AS id, md5(({n} * n)::text) AS t FROM generate_series(1, {}) n",
                100 * n
            ),
        ]
    },
    // Files that become shorter, and grow again under the same name.
    |_| vec!["DELETE FROM shrinks WHERE id > 3000".into(), "VACUUM shrinks".into()],
    |n| {
        let rows = format!("SELECT g, repeat('t', {n} % 60) FROM generate_series(9001, 12000) g");
        vec!["VACUUM shrinks".into(), format!("INSERT INTO shrinks {rows}")]
    },
    |n| {
        let rows = format!("SELECT g, repeat('q', {n} % 40) FROM generate_series(1, 900) g");
        vec![format!("TRUNCATE refilled; INSERT INTO refilled {rows}"), "CHECKPOINT".into()]
    },
    |n| {
        let rows = format!("SELECT g, md5((g * {n})::text) FROM generate_series(1, 700) g");
        let made = "BEGIN; DROP TABLE IF EXISTS twice; CREATE TABLE twice (id int, t text)";
        vec![format!(
            "{made}; INSERT INTO twice {rows}; TRUNCATE twice; INSERT INTO twice {rows}; COMMIT"
        )]
    },
    |_| vec!["DROP DATABASE IF EXISTS copied".into(), create("copied", "wal_log")],
    |_| vec!["DROP DATABASE IF EXISTS cloned".into(), create("cloned", "file_copy")],
    |n| vec![format!("stock: UPDATE goods SET t = md5(t || {n}) WHERE id % 7 = {n} % 7")],
    |_| vec!["ALTER TABLE volatile SET LOGGED".into(), "ALTER TABLE volatile SET UNLOGGED".into()],
    |n| {
        vec![
            format!("INSERT INTO volatile SELECT g, {n}::text FROM generate_series(1, 500) g"),
            "VACUUM".into(),
        ]
    },
];

fn create(name: &str, strategy: &str) -> String {
    format!("CREATE DATABASE {name} TEMPLATE stock STRATEGY {strategy}")
}
