//! Connections, TLS, and where the faults are done to requests.

use super::objects::Objects;
use super::store::Store;
use super::wire::{Ending, Wire};
use super::{ACCESS_KEY_ID, Action, Faults, Operation, Options, SECRET_ACCESS_KEY, Tls};
use anyhow::{Context, Result};
use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::CONTENT_LENGTH;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use s3s::Body;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

/// The server's thread, with a runtime of its own, so that a test without one can wait for it.
#[derive(Debug)]
pub(super) struct Running {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub(super) fn start(
        options: &Options,
        objects: Arc<Objects>,
        faults: Faults,
    ) -> Result<Running> {
        let listener = std::net::TcpListener::bind(options.listen)
            .with_context(|| format!("listen on {}", options.listen))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let tls = options.tls.as_ref().map(|tls| acceptor(tls, options.tls_is_old)).transpose()?;
        let mut service = S3ServiceBuilder::new(Store { objects, faults: faults.clone() });
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY_ID, SECRET_ACCESS_KEY));
        let front = Front { service: service.build(), faults, ending: Ending::default() };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("bucket")
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                tokio::select! {
                    () = accept(listener, tls, front) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        Ok(Running { address, stop: Some(stop), thread: Some(thread) })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, front: Front) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        if front.faults.refused() {
            continue;
        }
        let _ = stream.set_nodelay(true);
        let ending = Ending::default();
        let wire = Wire::new(stream, ending.clone());
        let (tls, front) = (tls.clone(), Front { ending: ending.clone(), ..front.clone() });
        let mut cuts = front.faults.cuts();
        let cut = async move {
            // Fails only when the server is gone.
            let _ = cuts.changed().await;
            ending.reset();
        };
        tokio::spawn(async move {
            tokio::select! {
                () = cut => {}
                () = converse(wire, tls, front) => {}
            }
        });
    }
}

async fn converse(wire: Wire, tls: Option<TlsAcceptor>, front: Front) {
    match tls {
        None => serve(wire, front).await,
        Some(tls) => {
            if let Ok(stream) = tls.accept(wire).await {
                serve(stream, front).await;
            }
        }
    }
}

/// A connection that breaks is the client's business.
async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, front: Front) {
    let service = hyper::service::service_fn(move |request| {
        let front = front.clone();
        async move { front.answer(request).await }
    });
    let connection = auto::Builder::new(TokioExecutor::new());
    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
}

/// The S3 service, and what goes wrong before and after it.
#[derive(Clone)]
struct Front {
    service: S3Service,
    faults: Faults,
    /// Of the connection.
    ending: Ending,
}

impl Front {
    /// An error here closes the connection without an answer.
    async fn answer(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        if self.faults.refused() {
            return Err(io::Error::other("the location is down"));
        }
        let operation = operation(request.method(), request.uri());
        let action = self.faults.next(operation, request.uri().path());
        let request = request.map(Body::from);
        match action {
            Some(Action::DropBefore) => return Err(io::Error::other("dropped before")),
            Some(Action::Reset) => return Err(self.reset("reset before")),
            Some(Action::HalfRequest) => {
                take_half(request).await?;
                return Err(self.reset("half of the request is enough"));
            }
            Some(Action::Hang) => std::future::pending().await,
            Some(Action::Delay(delay)) => tokio::time::sleep(delay).await,
            Some(Action::ErrorBefore(status)) => {
                request.into_body().collect().await.map_err(io::Error::other)?;
                return error(status);
            }
            _ => {}
        }
        let response =
            self.service.call(request).await.map_err(|e| io::Error::other(format!("{e:?}")))?;
        match action {
            Some(Action::DropAfterCommit) => Err(io::Error::other("dropped after")),
            Some(Action::ResetAfterCommit) => Err(self.reset("reset after")),
            Some(Action::HangAfterCommit) => std::future::pending().await,
            Some(Action::ErrorAfterCommit(status)) => error(status),
            Some(Action::Truncate) => truncate(response).await,
            Some(Action::Corrupt) => corrupt(response).await,
            _ => Ok(response),
        }
    }

    fn reset(&self, why: &'static str) -> io::Error {
        self.ending.reset();
        io::Error::other(why)
    }
}

/// Reads a request's body up to its middle.
async fn take_half(request: Request<Body>) -> io::Result<()> {
    let length = request.headers().get(CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse().ok());
    let half = length.unwrap_or(0u64) / 2;
    let (mut body, mut taken) = (request.into_body(), 0);
    while taken < half {
        let Some(frame) = body.frame().await else { break };
        let frame = frame.map_err(io::Error::other)?;
        taken += frame.data_ref().map_or(0, |bytes| bytes.len() as u64);
    }
    Ok(())
}

fn operation(method: &Method, uri: &Uri) -> Operation {
    let query = uri.query().unwrap_or_default();
    let asks = |name: &str| query.split('&').any(|part| part.split('=').next() == Some(name));
    let has_key = uri.path().trim_start_matches('/').contains('/');
    match *method {
        _ if asks("uploadId") || asks("uploads") => Operation::Multipart,
        Method::PUT if has_key => Operation::Put,
        Method::GET if has_key => Operation::Get,
        Method::HEAD if has_key => Operation::Head,
        Method::GET if asks("list-type") => Operation::List,
        Method::DELETE if has_key => Operation::Delete,
        Method::POST if asks("delete") => Operation::Delete,
        _ => Operation::Other,
    }
}

fn error(status: u16) -> io::Result<Response<Body>> {
    let code = match status {
        403 => "AccessDenied",
        409 => "ConditionalRequestConflict",
        503 => "SlowDown",
        _ => "InternalError",
    };
    let body = format!("<Error><Code>{code}</Code><Message>as scripted</Message></Error>");
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::from_u16(status).map_err(io::Error::other)?;
    Ok(response)
}

/// Keeps the length that was promised, sends half of it, and breaks off.
async fn truncate(response: Response<Body>) -> io::Result<Response<Body>> {
    let (head, body) = response.into_parts();
    let bytes = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let half = Frame::data(bytes.slice(..bytes.len() / 2));
    let frames: [io::Result<Frame<Bytes>>; 2] = [Ok(half), Err(io::Error::other("cut off"))];
    let body = Body::http_body_unsync(StreamBody::new(stream::iter(frames)));
    Ok(Response::from_parts(head, body))
}

async fn corrupt(response: Response<Body>) -> io::Result<Response<Body>> {
    let (head, body) = response.into_parts();
    let mut bytes = body.collect().await.map_err(io::Error::other)?.to_bytes().to_vec();
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 0x10;
    }
    Ok(Response::from_parts(head, Body::from(bytes)))
}

fn acceptor(tls: &Tls, is_old: bool) -> Result<TlsAcceptor> {
    let certificates = CertificateDer::pem_slice_iter(tls.certificate.as_bytes());
    let certificates = certificates.collect::<Result<Vec<_>, _>>().context("read certificates")?;
    let key = PrivateKeyDer::from_pem_slice(tls.key.as_bytes()).context("read key")?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = match is_old {
        true => vec![&rustls::version::TLS12],
        false => rustls::ALL_VERSIONS.to_vec(),
    };
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)?
        .with_no_client_auth()
        .with_single_cert(certificates, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A certificate for loopback, signed by an authority whose own certificate is left in `folder`.
pub(super) fn certificates(folder: &Path) -> Result<Tls> {
    let authority_key = rcgen::KeyPair::generate()?;
    let mut authority = rcgen::CertificateParams::new(Vec::new())?;
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    authority.distinguished_name.push(rcgen::DnType::CommonName, "Backstay test authority");
    let ca_file = folder.join("ca.pem");
    fs::write(&ca_file, authority.self_signed(&authority_key)?.pem())?;
    let key = rcgen::KeyPair::generate()?;
    let names = vec!["127.0.0.1".to_string(), "localhost".to_string()];
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let certificate = rcgen::CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    Ok(Tls { certificate: certificate.pem(), key: key.serialize_pem(), ca_file: Some(ca_file) })
}
