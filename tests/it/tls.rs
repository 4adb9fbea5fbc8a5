//! Logins over TLS: a SCRAM password under verify-full, and what is refused.

use crate::site::{PATIENCE, Site};
use anyhow::{Context, Result, ensure};
use backstay_tests::certificate::Authority;
use backstay_tests::ledger::Target;
use backstay_tests::major::Major;
use backstay_tests::on_drawn_major;
use backstay_tests::postgres::Cluster;
use backstay_tests::programs::{Configuration, Deployment};
use backstay_tests::scene::Scene;

const PASSWORD: &str = "correct5horse5battery";

/// A role with the rights that the README asks for and no others, over TLS with verify-full and SCRAM.
async fn scram_under_verify_full(scene: &Scene, major: Major) -> Result<()> {
    let authority = Authority::new()?;
    let cluster = Cluster::build(scene, &major)
        .tls(&authority.issue(&["localhost", "127.0.0.1"])?)
        .scram("superuser1")
        .start()
        .await?;
    let functions = match major.number() {
        14 => "pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean)",
        _ => "pg_backup_start(text, boolean), pg_backup_stop(boolean)",
    };
    cluster
        .sql(&format!(
            "CREATE ROLE backstay LOGIN REPLICATION PASSWORD '{PASSWORD}';
             GRANT pg_read_all_settings TO backstay;
             GRANT EXECUTE ON FUNCTION {functions} TO backstay;"
        ))
        .await?;
    let root = scene.path("root.crt");
    std::fs::write(&root, authority.pem())?;
    let conninfo = |host: &str, mode: &str, root: &std::path::Path, password: &str| {
        format!(
            "host={host} port={} user=backstay dbname=postgres password={password} sslmode={mode} sslrootcert={}",
            cluster.port(),
            root.display()
        )
    };
    let [near, far] = crate::site::LOCATIONS.map(|name| scene.path(name));
    let configuration = |conninfo: &str| -> Result<Configuration> {
        let configuration =
            Configuration::default().conninfo(conninfo).data_dir(Some(cluster.data()));
        configuration.folder("near", &near)?.folder("far", &far)
    };
    let good = configuration(&conninfo("localhost", "verify-full", &root, PASSWORD))?;
    let deployment = Deployment::new(scene, "backup", &good).await?;
    deployment.agent_command(&["init"]).await?.success()?;
    deployment.agent_command(&["check"]).await?.success()?;

    // Refused: an authority that isn't the server's; a password that isn't the role's; a name that the certificate lacks.
    let strange = scene.path("strange.crt");
    std::fs::write(&strange, Authority::new()?.pem())?;
    let refusals = [
        (conninfo("localhost", "verify-full", &strange, PASSWORD), "certificate"),
        (conninfo("localhost", "verify-ca", &strange, PASSWORD), "certificate"),
        (conninfo("localhost", "verify-full", &root, "wrong0word"), "password"),
        (conninfo("127.0.0.2", "verify-full", &root, PASSWORD), ""),
    ];
    for (conninfo, word) in &refusals {
        deployment.configure(&configuration(conninfo)?)?;
        for verb in ["check", "init"] {
            let refused = deployment.agent_command(&[verb]).await?.expect(6)?.says(&[word])?;
            let said = refused.stdout + &refused.stderr;
            ensure!(
                !said.contains(PASSWORD) && !said.contains("wrong0word"),
                "it tells a password: {said}"
            );
        }
    }
    deployment.configure(&good)?;
    let address = cluster.address();
    let mut site = Site::of(scene, cluster, good.clone().key(deployment.key())).await?;
    let ssl = "SELECT count(*) FROM pg_stat_replication r JOIN pg_stat_ssl s USING (pid) WHERE s.ssl AND r.usename = 'backstay'";
    ensure!(
        address.connect("postgres").await?.value(ssl).await? == "1",
        "the stream isn't under TLS"
    );
    site.ledger.wait_for(100, PATIENCE).await?;
    site.snapshot().await?;
    site.ledger.stop().await?;
    site.all_stored().await?;
    ensure!(!site.agent.log().contains(PASSWORD), "the agent logs the password");
    let (restored, _) = site.restore_and_start("copy", "latest", &[]).await?;
    site.judge(&restored, &Target::All).await.context("restored").map(|_| ())
}
on_drawn_major!(scram_under_verify_full);
