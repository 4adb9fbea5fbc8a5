//! Stores of all kinds, and what each of them counts for.

use crate::site::{PATIENCE, Site, acknowledged, has_snapshot, stored};
use anyhow::{Result, ensure};
use backstay_tests::bucket::{Action, Bucket, Fault};
use backstay_tests::gcs::{Gcs, State};
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Configuration, Deployment};
use backstay_tests::scene::Scene;
use serde_json::Value;

fn with_gcs(configuration: Configuration, gcs: &Gcs, name: &str, more: &str) -> Configuration {
    let settings = gcs.settings(name);
    let endpoint = settings.endpoint.unwrap_or_default();
    let key = gcs.key_file();
    let lines = format!(
        "endpoint = \"{endpoint}\"\nallow-http = true\ncredentials-file = \"{}\"\n{more}",
        key.display()
    );
    configuration.location_with(name, &settings.url, &lines)
}

fn with_bucket(configuration: Configuration, bucket: &Bucket, more: &str) -> Configuration {
    let settings = bucket.settings("s3");
    let endpoint = settings.endpoint.unwrap_or_default();
    let secret = settings.secret_access_key.as_ref().map_or("", |secret| secret.expose());
    let lines = format!(
        "endpoint = \"{endpoint}\"\nallow-http = true\nregion = \"us-east-1\"\n\
         access-key-id = \"{}\"\nsecret-access-key = \"{secret}\"\n{more}",
        settings.access_key_id.unwrap_or_default()
    );
    configuration.location_with("s3", &settings.url, &lines)
}

/// Under `all`, a best-effort location that is down holds up neither acknowledgement nor a snapshot; the other one, at
/// Google, is enough to restore from. Back again, it is filled.
async fn a_best_effort_location_that_is_down_delays_nothing(
    scene: &Scene,
    major: Major,
) -> Result<()> {
    let (gcs, bucket) = (Gcs::start()?, Bucket::start().await);
    let cluster = Cluster::build(scene, &major).start().await?;
    let configuration = Configuration::default().server(&cluster).acknowledge("all");
    let configuration = with_gcs(configuration, &gcs, "google", "");
    let configuration = with_bucket(configuration, &bucket, "role = \"best-effort\"\n");
    let mut site = Site::of(scene, cluster, configuration).await?;
    bucket.faults().refuse(true);
    site.ledger.wait_for(100, PATIENCE).await?;
    let end = site.cluster.flushed().await?;
    let status = site
        .agent
        .wait_until("it is acknowledged without the other", PATIENCE, |status| {
            acknowledged(status) >= Some(end)
        })
        .await?;
    ensure!(stored(&status)?[1] < end, "the location is down: {status}");
    ensure!(status["wal"]["locations"][1]["role"] == "best-effort", "{status}");
    let outcome = site.deployment.agent_command(&["snapshot", "--json"]).await?.expect(0)?;
    ensure!(outcome.json()?["pending"].to_string().contains("s3"), "{}", outcome.stdout);
    site.ledger.stop().await?;
    let end = site.cluster.flushed().await?;
    let has_all = |status: &Value| stored(status).is_ok_and(|stored| stored[0] >= end);
    site.agent.wait_until("google has it all", PATIENCE, has_all).await?;
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await?;
    bucket.faults().refuse(false);
    site.all_stored().await.map(drop)
}
on_drawn_major!(a_best_effort_location_that_is_down_delays_nothing);

/// `init` waits while a store is overloaded, and refuses one that ignores conditions by name; declared as such, it is
/// used, and `check` warns.
async fn stores_are_tried_before_they_are_used(scene: &Scene, major: Major) -> Result<()> {
    let (gcs, bucket) = (Gcs::start()?, Bucket::start().await);
    let cluster = Cluster::build(scene, &major).start().await?;
    let base = Configuration::default().server(&cluster);
    let deployment =
        Deployment::new(scene, "backup", &with_bucket(base.clone(), &bucket, "")).await?;
    let overload = bucket.faults().add(Fault::always(Action::ErrorBefore(503)).times(12));
    deployment.agent_command(&["init"]).await?.success()?;
    ensure!(bucket.faults().fired(overload) == 12, "the store was overloaded");

    let change = |change: fn(&mut State)| change(&mut gcs.state());
    change(|state| state.ignores_conditions = true);
    deployment.configure(&with_gcs(base.clone(), &gcs, "google", ""))?;
    let refused = deployment.agent_command(&["init"]).await?.expect(5)?;
    refused.says(&[
        "google",
        "create-if-absent",
        "gs://backstay/google",
        "single-writer = true",
    ])?;
    ensure!(gcs.state().objects.is_empty(), "it was refused");
    deployment.configure(&with_gcs(base, &gcs, "google", "single-writer = true\n"))?;
    deployment.agent_command(&["init"]).await?.success()?;
    let checked = deployment.agent_command(&["check"]).await?.success()?;
    checked.says(&["warn  location google", "ignores conditional writes"])?;
    change(|state| state.ignores_conditions = false);
    change(|state| state.clock_ahead = jiff::SignedDuration::from_mins(10));
    let checked = deployment.agent_command(&["check"]).await?.success()?;
    checked.says(&["its clock is", "single-writer can be removed"]).map(drop)
}
on_drawn_major!(stores_are_tried_before_they_are_used);

/// An agent that commits wait for, and whose word is its spool, is an alarm while it is so.
async fn a_synchronous_agent_that_acknowledges_its_spool(
    scene: &Scene,
    major: Major,
) -> Result<()> {
    let mut site = Site::start(scene, &major).await?;
    let slot = site.cluster.value("SELECT slot_name FROM pg_replication_slots").await?;
    site.cluster
        .sql(&format!("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (x, \"{slot}\")'"))
        .await?;
    site.cluster.sql("SELECT pg_reload_conf()").await?;
    let alarmed = |status: &Value| status["alarms"].to_string().contains("synchronous-spool");
    site.agent.wait_until("it is an alarm", PATIENCE * 2, alarmed).await?;
    let checked = site.deployment.agent_command(&["check"]).await?.success()?;
    checked.says(&["warn  durability", "synchronous_standby_names"])?;
    site.cluster.sql("ALTER SYSTEM RESET synchronous_standby_names").await?;
    site.cluster.sql("SELECT pg_reload_conf()").await?;
    let well = |status: &Value| has_snapshot(status) && !alarmed(status);
    site.agent.wait_until("it is none any more", PATIENCE * 2, well).await?;
    site.ledger.stop().await.map(drop)
}
on_drawn_major!(a_synchronous_agent_that_acknowledges_its_spool);
