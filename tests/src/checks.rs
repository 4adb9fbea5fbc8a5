//! Whether the files of a server are sound, as PostgreSQL's own checkers see it.

use crate::postgres::{Cluster, Session};
use anyhow::{Context, Result, bail, ensure};

/// Faults told for each kind of check; of the rest, that there are more.
const FAULTS_TOLD: usize = 10;

/// What was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checked {
    pub databases: usize,
    pub indexes: usize,
    pub relations: usize,
}

/// Checks every btree index against its table (amcheck, every heap tuple indexed), every table with its
/// toast (`verify_heapam`), and every visibility map (pg_visibility), in every database. Every page of
/// them is read, so page checksums are verified too. The server must take writes, as the extensions are created,
/// and nobody else should write meanwhile.
pub async fn check_all(cluster: &Cluster) -> Result<Checked> {
    let databases = cluster
        .connect()
        .await?
        .rows(
            "SELECT datname FROM pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY 1",
        )
        .await?;
    let mut checked = Checked::default();
    for name in databases.into_iter().flatten() {
        let session = cluster.connect_to(&name).await?;
        check_database(&session, &mut checked).await.with_context(|| format!("database {name}"))?;
        checked.databases += 1;
    }
    ensure!(checked.indexes > 0 && checked.relations > 0, "nothing was checked");
    Ok(checked)
}

async fn check_database(session: &Session, checked: &mut Checked) -> Result<()> {
    session
        .batch_execute(
            "SET client_min_messages = warning;
             CREATE EXTENSION IF NOT EXISTS amcheck;
             CREATE EXTENSION IF NOT EXISTS pg_visibility;",
        )
        .await?;
    let indexes = session.rows(INDEXES).await?;
    for row in &indexes {
        let query = format!("SELECT bt_index_parent_check({}::regclass, true, true)", row[0]);
        session.rows(&query).await.with_context(|| format!("index {}", row[1]))?;
    }
    checked.indexes += indexes.len();
    for row in session.rows(RELATIONS).await? {
        let oid = &row[0];
        for query in [
            format!("SELECT * FROM verify_heapam({oid}::regclass, check_toast => true)"),
            format!("SELECT * FROM pg_check_visible({oid}::regclass)"),
            format!("SELECT * FROM pg_check_frozen({oid}::regclass)"),
        ] {
            no_rows(session, &query).await.with_context(|| format!("table {}", row[1]))?;
        }
        checked.relations += 1;
    }
    Ok(())
}

async fn no_rows(session: &Session, query: &str) -> Result<()> {
    let faults = session.rows(query).await?;
    if !faults.is_empty() {
        let told: Vec<String> =
            faults.iter().take(FAULTS_TOLD).map(|fault| fault.join(" | ")).collect();
        bail!("{} faults: {query}\n  {}", faults.len(), told.join("\n  "));
    }
    Ok(())
}

const INDEXES: &str = "
    SELECT c.oid, c.oid::regclass FROM pg_class c
    JOIN pg_index i ON i.indexrelid = c.oid JOIN pg_am a ON a.oid = c.relam
    WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence <> 't'
      AND i.indisready AND i.indisvalid";

const RELATIONS: &str = "
    SELECT c.oid, c.oid::regclass FROM pg_class c
    WHERE c.relkind IN ('r', 'm', 't') AND c.relpersistence <> 't'";
