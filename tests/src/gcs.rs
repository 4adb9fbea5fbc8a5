//! A small Google Cloud Storage: as much of its XML API as a location asks for.
//!
//! Single objects with conditions on their generation, ranges, checksums verified before anything is published,
//! listings in pages that can begin behind a key. Every request takes effect at one instant. It runs on a
//! thread of its own, and ends with the value that started it.

use anyhow::{Context, Result};
use backstay_common::location::LocationSettings;
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, LAST_MODIFIED, RANGE};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// The only bucket that there is.
pub const BUCKET: &str = "backstay";
const ACCOUNT: &str = "agent@backstay.iam.gserviceaccount.com";
/// Google's own is 1000.
const PAGE: usize = 100;

/// A running server. Dropping it ends it, and what it held is gone.
#[derive(Debug)]
pub struct Gcs {
    endpoint: String,
    state: Arc<Mutex<State>>,
    folder: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// How the server falls short of Google's, and what it holds.
#[derive(Debug, Default)]
pub struct State {
    /// Writes over objects whatever generation is asked for.
    pub ignores_conditions: bool,
    /// Lists from the beginning, whatever key it is to begin behind.
    pub ignores_start: bool,
    /// Stores a body that differs from its checksum.
    pub ignores_checksums: bool,
    /// Answers so many requests with this status first.
    pub fails: (u32, u16),
    /// The clock that objects are dated by is ahead by so much.
    pub clock_ahead: jiff::SignedDuration,
    /// Uploads that carried a checksum.
    pub checked: u64,
    pub objects: BTreeMap<String, Object>,
    generation: u64,
}

/// One object.
#[derive(Clone, Debug)]
pub struct Object {
    pub bytes: Bytes,
    /// As the upload asked for.
    pub storage_class: Option<String>,
    generation: u64,
    modified: Timestamp,
}

type Answer = Response<Full<Bytes>>;

impl Gcs {
    /// Plain HTTP on a free port of loopback.
    pub fn start() -> Result<Gcs> {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let state = Arc::new(Mutex::new(State::default()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("gcs")
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let shared = state.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                tokio::select! {
                    () = accept(listener, shared) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        let folder = tempfile::tempdir()?;
        write_key(&folder.path().join("key.json"))?;
        Ok(Gcs { endpoint, state, folder, stop: Some(stop), thread: Some(thread) })
    }

    /// A location of this name, under a prefix of the same name.
    ///
    /// # Panics
    /// If `name` is not the name of a location.
    pub fn settings(&self, name: &str) -> LocationSettings {
        let location = name.parse().expect("the name of a location");
        let mut settings = LocationSettings::new(location, format!("gs://{BUCKET}/{name}"));
        settings.endpoint = Some(self.endpoint.clone());
        settings.allow_http = true;
        settings.credentials_file = Some(self.key_file());
        settings.request_timeout = Duration::from_secs(10);
        settings
    }

    /// The key of a service account that the server knows.
    pub fn key_file(&self) -> PathBuf {
        self.folder.path().join("key.json")
    }

    /// Locked for as long as it is held.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Gcs {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A key made for this moment: RSA, which only openssl makes here.
fn write_key(path: &Path) -> Result<()> {
    let made = Command::new("openssl")
        .args(["genpkey", "-quiet", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"])
        .output()
        .context("openssl is needed for the key of a service account")?;
    let made = match made.status.success() {
        true => made,
        // Before version 3 it is not quiet.
        false => Command::new("openssl").args(["genpkey", "-algorithm", "RSA"]).output()?,
    };
    let key = serde_json::json!({
        "type": "service_account",
        "client_email": ACCOUNT,
        "private_key_id": "1",
        "private_key": String::from_utf8(made.stdout)?,
    });
    Ok(std::fs::write(path, key.to_string())?)
}

async fn accept(listener: TcpListener, state: Arc<Mutex<State>>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let state = state.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| answer(request, state.clone()));
            let connection = auto::Builder::new(TokioExecutor::new());
            let _ = connection.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
) -> Result<Answer, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    if state.fails.0 > 0 {
        state.fails.0 -= 1;
        return Ok(refusal(state.fails.1, "Scripted"));
    }
    let path = decode(head.uri.path());
    let (bucket, key) = path[1..].split_once('/').unwrap_or((&path[1..], ""));
    let query = query(head.uri.query().unwrap_or_default());
    if !is_known(&head.headers) {
        return Ok(refusal(401, "AuthenticationRequired"));
    }
    if bucket != BUCKET {
        return Ok(refusal(404, "NoSuchBucket"));
    }
    Ok(match head.method {
        Method::GET if key.is_empty() => list(&state, &query),
        Method::PUT => put(&mut state, key, &head.headers, body),
        Method::GET | Method::HEAD => get(&state, key, &head.headers, head.method == Method::HEAD),
        Method::DELETE => match state.objects.remove(key) {
            Some(_) => plain(204, Bytes::new()),
            None => refusal(404, "NoSuchKey"),
        },
        _ => refusal(501, "NotImplemented"),
    })
}

/// A bearer token that the service account has issued to itself.
fn is_known(headers: &HeaderMap) -> bool {
    let claims = || {
        let token = text(headers, AUTHORIZATION.as_str())?.strip_prefix("Bearer ")?;
        let claims = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
        serde_json::from_slice::<serde_json::Value>(&claims).ok()
    };
    claims().is_some_and(|claims| claims["iss"] == ACCOUNT)
}

fn put(state: &mut State, key: &str, headers: &HeaderMap, bytes: Bytes) -> Answer {
    let found = state.objects.get(key).map_or(0, |object| object.generation);
    let wanted = text(headers, "x-goog-if-generation-match").and_then(|w| w.parse::<u64>().ok());
    if wanted.is_some_and(|wanted| wanted != found) && !state.ignores_conditions {
        return refusal(412, "PreconditionFailed");
    }
    if let Some(hash) = text(headers, "x-goog-hash") {
        let found = BASE64_STANDARD.encode(crc32c::crc32c(&bytes).to_be_bytes());
        if hash != format!("crc32c={found}") && !state.ignores_checksums {
            return refusal(400, "BadDigest");
        }
        state.checked += 1;
    }
    state.generation += 1;
    let object = Object {
        bytes,
        storage_class: text(headers, "x-goog-storage-class").map(str::to_string),
        generation: state.generation,
        modified: Timestamp::now() + state.clock_ahead,
    };
    let mut answer = plain(200, Bytes::new());
    describe(&mut answer, &object);
    state.objects.insert(key.to_string(), object);
    answer
}

fn get(state: &State, key: &str, headers: &HeaderMap, is_head: bool) -> Answer {
    let Some(object) = state.objects.get(key) else { return refusal(404, "NoSuchKey") };
    let size = object.bytes.len() as u64;
    let range = text(headers, RANGE.as_str()).map(|range| wanted_range(range, size));
    let mut answer = match range {
        None => plain(200, object.bytes.clone()),
        Some(None) => return refusal(416, "InvalidRange"),
        Some(Some(range)) => {
            let of = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            let mut answer =
                plain(206, object.bytes.slice(range.start as usize..range.end as usize));
            answer.headers_mut().insert(CONTENT_RANGE, value(of));
            answer
        }
    };
    describe(&mut answer, object);
    if is_head {
        answer.headers_mut().insert(CONTENT_LENGTH, value(size.to_string()));
        *answer.body_mut() = Full::default();
    }
    answer
}

/// `bytes=FIRST-LAST`; what is beyond the end is left out.
fn wanted_range(text: &str, size: u64) -> Option<Range<u64>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let last = last.parse().unwrap_or(u64::MAX).min(size.checked_sub(1)?);
    (first <= last).then(|| first..last + 1)
}

fn list(state: &State, query: &BTreeMap<String, String>) -> Answer {
    let asked = |name: &str| query.get(name).map(String::as_str).unwrap_or_default();
    let prefix = asked("prefix");
    let start = if state.ignores_start { "" } else { asked("start-after") };
    let after = asked("continuation-token").max(start);
    let mut keys = state.objects.iter().filter(|(key, _)| key.starts_with(prefix));
    let page: Vec<_> = keys.by_ref().filter(|(key, _)| key.as_str() > after).take(PAGE).collect();
    let mut xml = String::from("<?xml version='1.0' encoding='UTF-8'?><ListBucketResult>");
    for (key, object) in &page {
        let Object { bytes, modified, generation, .. } = object;
        let size = bytes.len();
        let _ = write!(
            xml,
            "<Contents><Key>{key}</Key><LastModified>{modified}</LastModified>\
             <ETag>\"{generation}\"</ETag><Size>{size}</Size></Contents>"
        );
    }
    if let (Some((last, _)), Some(_)) = (page.last(), keys.next()) {
        let _ = write!(xml, "<NextContinuationToken>{last}</NextContinuationToken>");
    }
    plain(200, Bytes::from(xml + "</ListBucketResult>"))
}

fn describe(answer: &mut Answer, object: &Object) {
    let date = object.modified.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    let headers = answer.headers_mut();
    headers.insert(ETAG, value(format!("\"{}\"", object.generation)));
    headers.insert(LAST_MODIFIED, value(date));
    headers.insert("x-goog-generation", value(object.generation.to_string()));
}

fn plain(status: u16, body: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(body));
    *answer.status_mut() = StatusCode::from_u16(status).expect("a status");
    answer
}

fn refusal(status: u16, code: &str) -> Answer {
    let body = format!("<Error><Code>{code}</Code><Message>as it is</Message></Error>");
    plain(status, Bytes::from(body))
}

fn value(text: String) -> hyper::header::HeaderValue {
    text.try_into().expect("plain text")
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn query(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (decode(name), decode(&value.replace('+', " ")))).collect()
}

/// Percent-encoded text; what is no UTF-8 is no key of ours.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, more)) = rest.split_first() {
        let pair = more.get(..2).and_then(|pair| std::str::from_utf8(pair).ok());
        match pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).filter(|_| first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = &more[2..];
            }
            None => {
                bytes.push(first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
