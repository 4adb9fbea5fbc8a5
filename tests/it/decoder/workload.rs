//! One of everything that a server writes into its WAL, as far as a backup could stumble over it.

use anyhow::{Context, Result, ensure};
use backstay_common::lsn::Lsn;
use backstay_tests::major::Major;
use backstay_tests::postgres::{Builder, Cluster, Session};
use backstay_tests::random::Random;
use backstay_tests::scene::Scene;
use std::time::{Duration, Instant};

/// Kills that may be needed until one leaves half a record behind.
const KILLS_MAX: usize = 5;
const MESSAGE_BYTES: u64 = 48 << 20;
/// How long a kill waits for its moment.
const PATIENCE: Duration = Duration::from_secs(60);
/// When the replicated transaction was committed where it came from.
pub const REPLICATED_TIME: &str = "2001-02-03 04:05:06Z";

/// Keeps all WAL, and little of it in memory, so that a long record is on disk by and by.
pub fn build<'a>(scene: &'a Scene, major: &Major, mib: u32) -> Builder<'a> {
    Cluster::build(scene, major)
        .name(&format!("s{mib}"))
        .segment_mib(mib)
        .setting("wal_level", "logical")
        .setting("wal_buffers", "64kB")
        .setting("wal_keep_size", "4GB")
        .setting("max_wal_size", "8GB")
        .setting("max_prepared_transactions", "10")
        .setting("wal_log_hints", "on")
}

/// What was done, for comparison with what was decoded.
#[derive(Debug)]
pub struct Workload {
    pub random: Random,
    pub start: Lsn,
    pub first_xid: u32,
    pub last_xid: u32,
    pub committed_subtransactions: usize,
    /// The transaction that was replicated from elsewhere.
    pub replicated_xid: u32,
    /// Names, and where their records end.
    pub restore_points: Vec<(String, Lsn)>,
    major: u32,
    /// Of `wal_compression`.
    methods: Vec<String>,
}

impl Workload {
    pub async fn begin(cluster: &Cluster, random: Random) -> Result<Workload> {
        let session = cluster.connect().await?;
        let start = insert_lsn(&session).await?;
        let first_xid = session.value("SELECT pg_current_xact_id()").await?.parse()?;
        let offered = session
            .value("SELECT array_to_string(enumvals, ',') FROM pg_settings WHERE name = 'wal_compression'")
            .await?;
        let known = ["pglz", "lz4", "zstd"];
        let methods: Vec<String> = match offered.is_empty() {
            true => vec!["on".to_owned()],
            false => offered.split(',').filter(|m| known.contains(m)).map(str::to_owned).collect(),
        };
        session
            .batch_execute(
                "CREATE TABLE wide (id int PRIMARY KEY, body text);
                 INSERT INTO wide SELECT n, repeat(md5(n::text), 8) FROM generate_series(1, 4000) n;
                 CREATE TABLE toasted (body text); ALTER TABLE toasted ALTER body SET STORAGE EXTERNAL;",
            )
            .await?;
        Ok(Workload {
            major: cluster.major().number(),
            random,
            start,
            first_xid,
            last_xid: 0,
            committed_subtransactions: 0,
            replicated_xid: 0,
            restore_points: Vec::new(),
            methods,
        })
    }

    /// All that wants no crash; ends with a restart under other settings.
    pub async fn play(&mut self, cluster: &mut Cluster) -> Result<()> {
        let session = cluster.connect().await?;
        self.images(&session).await?;
        self.long_records(&session).await?;
        self.two_phases(&session).await?;
        self.subtransactions(&session).await?;
        self.origin(&session).await?;
        self.restore_point(&session, "before the release").await?;
        self.backup(&session).await?;
        self.switches(&session).await?;
        drop(session);
        self.settings(cluster).await
    }

    /// Full-page images, compressed each way and not at all.
    async fn images(&self, session: &Session) -> Result<()> {
        for method in self.methods.iter().map(String::as_str).chain(["off"]) {
            session.batch_execute(&format!("SET wal_compression = '{method}'; CHECKPOINT")).await?;
            session.batch_execute("UPDATE wide SET body = body || 'x' WHERE id % 9 = 0").await?;
            session.batch_execute("SELECT count(*) FROM wide").await?;
        }
        Ok(())
    }

    async fn long_records(&mut self, session: &Session) -> Result<()> {
        for transactional in [true, false] {
            let bytes = self.random.range(2_000_000..9_000_000);
            session.batch_execute(&message(transactional, bytes)).await?;
        }
        let text = self.random.hex(2_000_000);
        session.batch_execute(&format!("INSERT INTO toasted VALUES ('{text}')")).await?;
        // A commit record over many pages: some thousand subtransactions, each with an invalidation or two.
        let many = self.random.range(2_500..4_000) as usize;
        self.committed_subtransactions += many;
        session.batch_execute(&nested(many, "INSERT INTO toasted VALUES ('in')")).await?;
        Ok(())
    }

    async fn two_phases(&self, session: &Session) -> Result<()> {
        for end in ["COMMIT", "ROLLBACK"] {
            session
                .batch_execute(&format!(
                    "CREATE TABLE dropped_{end} (id int PRIMARY KEY, body text)"
                ))
                .await?;
            session.batch_execute("BEGIN").await?;
            session
                .batch_execute(&format!(
                    "INSERT INTO toasted VALUES ('prepared');
                     CREATE TABLE made_{end} (id int PRIMARY KEY, body text);
                     DROP TABLE dropped_{end}; PREPARE TRANSACTION 'both {end}'"
                ))
                .await?;
            session.batch_execute("UPDATE toasted SET body = 'between'").await?;
            session.batch_execute(&format!("{end} PREPARED 'both {end}'")).await?;
        }
        Ok(())
    }

    /// Kept and rolled back, with relations that come and go in them, more than one record can assign.
    async fn subtransactions(&mut self, session: &Session) -> Result<()> {
        session.batch_execute("CREATE TABLE sub_dropped (id int PRIMARY KEY)").await?;
        for (end, kept) in [("COMMIT", 3), ("ROLLBACK", 0)] {
            session.batch_execute("BEGIN").await?;
            for statement in [
                "INSERT INTO wide VALUES (-2, 'top')",
                "SAVEPOINT a",
                "CREATE TABLE sub_made (body text)",
                "SAVEPOINT b",
                "DROP TABLE sub_dropped",
                "SAVEPOINT c",
                "INSERT INTO sub_made VALUES ('kept')",
                "SAVEPOINT d",
                "CREATE TABLE sub_lost (body text)",
                "ROLLBACK TO d",
                end,
            ] {
                session.batch_execute(statement).await?;
            }
            self.committed_subtransactions += kept;
            session.batch_execute("DROP TABLE IF EXISTS sub_made").await?;
            session.batch_execute("DELETE FROM wide WHERE id = -2").await?;
            session.batch_execute("CREATE TABLE IF NOT EXISTS sub_dropped (id int)").await?;
        }
        self.committed_subtransactions += 100;
        session
            .batch_execute(&nested(100, "INSERT INTO wide VALUES (-100 - n, 'in')"))
            .await
            .map_err(Into::into)
    }

    /// A commit that says whence it was replicated, and when it was made there.
    async fn origin(&mut self, session: &Session) -> Result<()> {
        session.batch_execute("SELECT pg_replication_origin_create('elsewhere')").await?;
        session.batch_execute("SELECT pg_replication_origin_session_setup('elsewhere')").await?;
        session.batch_execute("BEGIN").await?;
        let place = format!("'0/ABCDEF', '{REPLICATED_TIME}'");
        session.batch_execute(&format!("SELECT pg_replication_origin_xact_setup({place})")).await?;
        let insert = "INSERT INTO toasted VALUES ('replicated') RETURNING pg_current_xact_id()";
        self.replicated_xid = session.value(insert).await?.parse()?;
        session.batch_execute("COMMIT").await?;
        session.batch_execute("SELECT pg_replication_origin_session_reset()").await?;
        Ok(())
    }

    async fn restore_point(&mut self, session: &Session, name: &str) -> Result<()> {
        let end = session.value(&format!("SELECT pg_create_restore_point('{name}')")).await?;
        self.restore_points.push((name.to_owned(), parse(&end)?));
        Ok(())
    }

    async fn backup(&self, session: &Session) -> Result<()> {
        let (start, stop) = match self.major {
            14 => ("pg_start_backup('b', true, false)", "pg_stop_backup(false, false)"),
            _ => ("pg_backup_start('b', true)", "pg_backup_stop(false)"),
        };
        session.rows(&format!("SELECT {start}")).await?;
        session.batch_execute("INSERT INTO toasted VALUES ('in the backup')").await?;
        session.rows(&format!("SELECT {stop}")).await?;
        Ok(())
    }

    async fn switches(&mut self, session: &Session) -> Result<()> {
        for name in ["größer", "sixty-three bytes of name sixty-three bytes of name sixty-three"]
        {
            session.batch_execute("INSERT INTO toasted VALUES ('before a switch')").await?;
            session.rows("SELECT pg_switch_wal()").await?;
            self.restore_point(session, name).await?;
        }
        Ok(())
    }

    async fn settings(&self, cluster: &mut Cluster) -> Result<()> {
        for value in ["off", "on"] {
            let session = cluster.connect().await?;
            session.batch_execute(&format!("ALTER SYSTEM SET full_page_writes = {value}")).await?;
            session.batch_execute("SELECT pg_reload_conf()").await?;
            // The checkpointer learns of it on its own; a new session shows what the postmaster knows.
            while cluster.value("SHOW full_page_writes").await? != value {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            session.batch_execute("CHECKPOINT").await?;
        }
        cluster.sql("ALTER SYSTEM SET max_connections = 45").await?;
        cluster.restart().await
    }

    /// Kills the server while it writes a long record. False if no kill came at the right moment.
    pub async fn crash_inside_a_record(&mut self, cluster: &mut Cluster) -> Result<bool> {
        for _ in 0..KILLS_MAX {
            let mark = self.random.range(1 << 20..MESSAGE_BYTES / 2);
            let (writer, watcher) = (cluster.connect().await?, cluster.connect().await?);
            watcher.batch_execute("INSERT INTO toasted VALUES ('before the crash')").await?;
            let before = written(&watcher).await?;
            let task = tokio::spawn(async move {
                // Cut off by the kill, or done before it.
                let _ = writer.batch_execute(&message(false, MESSAGE_BYTES)).await;
            });
            let deadline = Instant::now() + PATIENCE;
            while written(&watcher).await?.since(before) < mark
                && !task.is_finished()
                && Instant::now() < deadline
            {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            cluster.kill()?;
            let _ = task.await;
            cluster.start().await?;
            let after = cluster.connect().await?;
            if written(&after).await?.since(before) < MESSAGE_BYTES {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub async fn after_the_crash(&mut self, cluster: &Cluster) -> Result<()> {
        let session = cluster.connect().await?;
        session.batch_execute("INSERT INTO toasted VALUES ('after the crash')").await?;
        session.batch_execute(&message(true, self.random.range(10_000..100_000))).await?;
        self.restore_point(&session, "after the crash").await
    }

    /// Ends with a commit that is flushed.
    pub async fn last(&mut self, cluster: &Cluster) -> Result<()> {
        let session = cluster.connect().await?;
        session.batch_execute("CREATE EXTENSION IF NOT EXISTS amcheck").await?;
        session.batch_execute(&message(true, 3_000_000)).await?;
        self.restore_point(&session, "after the promotion").await?;
        let last = "INSERT INTO toasted VALUES ('last') RETURNING pg_current_xact_id()";
        self.last_xid = session.value(last).await?.parse()?;
        Ok(())
    }

    /// Fails unless the server says that images were compressed in every way that it can.
    pub async fn ensure_images(
        &self,
        session: &Session,
        start: Lsn,
        until: Lsn,
        label: &str,
    ) -> Result<()> {
        let mut counts = Vec::new();
        for method in &self.methods {
            // 15 tells of blocks in the record's row, later majors do in the block's own.
            let count = match self.major {
                15 => format!(
                    "SELECT count(*) FROM pg_get_wal_records_info('{start}', '{until}')
                     WHERE block_ref LIKE '%method: {method}%'"
                ),
                _ => format!(
                    "SELECT count(*) FROM pg_get_wal_block_info('{start}', '{until}', false)
                     WHERE block_fpi_info @> ARRAY['COMPRESS_{}']",
                    method.to_uppercase()
                ),
            };
            let count: u64 = session.value(&count).await?.parse()?;
            ensure!(count > 0, "no page image is compressed with {method}");
            counts.push(format!("{method} {count}"));
        }
        println!("{label}: page images: {}", counts.join(", "));
        Ok(())
    }
}

/// A copy of a stopped server, brought to life as a standby and promoted inside its last segment.
pub async fn promoted(scene: &Scene, primary: &mut Cluster, name: &str) -> Result<Cluster> {
    let mut copy = primary.copy_to(scene, name)?;
    let signal = copy.data().join("standby.signal");
    std::fs::write(&signal, "")?;
    scene.give(&signal)?;
    copy.start().await?;
    copy.promote().await?;
    copy.wait_until_writable(Duration::from_secs(30)).await?;
    Ok(copy)
}

fn message(transactional: bool, bytes: u64) -> String {
    format!("SELECT pg_logical_emit_message({transactional}, 'long', repeat('m', {bytes}))")
}

/// One statement in each of `count` subtransactions.
fn nested(count: usize, statement: &str) -> String {
    format!(
        "DO $$ BEGIN FOR n IN 1..{count} LOOP
           BEGIN {statement}; EXCEPTION WHEN division_by_zero THEN NULL; END;
         END LOOP; END $$"
    )
}

async fn insert_lsn(session: &Session) -> Result<Lsn> {
    parse(&session.value("SELECT pg_current_wal_insert_lsn()").await?)
}

/// How far WAL has gone to the files.
async fn written(session: &Session) -> Result<Lsn> {
    parse(&session.value("SELECT pg_current_wal_lsn()").await?)
}

fn parse(lsn: &str) -> Result<Lsn> {
    lsn.parse().ok().with_context(|| format!("{lsn:?} is no LSN"))
}
