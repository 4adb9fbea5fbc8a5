//! The harness' S3 server as a program: for trying things by hand, and for measuring.

use anyhow::{Context, Result};
use backstay_tests::bucket::{
    ACCESS_KEY_ID, Action, Bucket, Fault, Operation, Options, REGION, SECRET_ACCESS_KEY, Tls,
};
use clap::Parser;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Serves S3 on loopback until it is interrupted.
#[derive(Parser)]
#[command(name = "s3-server")]
struct Args {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// A bucket to serve; may be given several times.
    #[arg(long = "bucket", default_value = "backstay")]
    buckets: Vec<String>,
    /// Keep objects in this folder instead of in memory.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Serve TLS, with this certificate chain and key (PEM).
    #[arg(long, num_args = 2, value_names = ["CERT", "KEY"])]
    tls: Option<Vec<PathBuf>>,
    /// Every PUT takes so many milliseconds longer, as if the store were far away.
    #[arg(long, default_value_t = 0)]
    put_delay_ms: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args = Args::parse();
    let tls = args.tls.as_deref().map(read_tls).transpose()?;
    let Args { listen, buckets, dir, put_delay_ms, .. } = args;
    let server = Bucket::with(Options { listen, buckets, dir, tls, ..Options::default() })?;
    if put_delay_ms > 0 {
        let delay = Action::Delay(Duration::from_millis(put_delay_ms));
        server.faults().add(Fault::on(Operation::Put, delay));
    }
    println!("endpoint {}", server.endpoint());
    println!("export AWS_ENDPOINT_URL={}", server.endpoint());
    println!("export AWS_ACCESS_KEY_ID={ACCESS_KEY_ID}");
    println!("export AWS_SECRET_ACCESS_KEY={SECRET_ACCESS_KEY}");
    println!("export AWS_REGION={REGION}");
    if server.endpoint().starts_with("http:") {
        println!("export AWS_ALLOW_HTTP=true");
    }
    tokio::signal::ctrl_c().await.context("wait for an interrupt")
}

fn read_tls(files: &[PathBuf]) -> Result<Tls> {
    let read = |path: &PathBuf| {
        fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
    };
    Ok(Tls { certificate: read(&files[0])?, key: read(&files[1])?, ca_file: None })
}
