//! TLS to the server, by libpq's `sslmode` rules. TLS 1.2 and 1.3 only.

use super::certificate;
use super::conninfo::{Host, Place, Roots, Ssl, SslMode};
use super::wire::Socket;
use crate::pgtime::PgTime;
use crate::{Context, Error, Kind, Result};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::TlsConnector;

/// An open TLS connection.
pub(super) struct Secured {
    pub socket: Box<dyn Socket>,
    /// The server's certificate, hashed for channel binding, where it can be.
    pub end_point: Option<Vec<u8>>,
}

/// Shakes hands on a socket whose server has agreed to TLS. Not safe to drop and go on.
pub(super) async fn secure(
    socket: impl Socket + 'static,
    ssl: &Ssl,
    host: &Host,
    peer: std::net::IpAddr,
) -> Result<Secured> {
    let name = server_name(ssl, host, peer)?;
    let ssl = ssl.clone();
    // Reads files, and for "system" some hundred certificates.
    let config = tokio::task::spawn_blocking(move || client_config(&ssl))
        .await
        .map_err(|error| Error::new(Kind::Bug, format_args!("load certificates: {error}")))??;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, socket)
        .await
        .map_err(handshake_error)?;
    let certificates = stream.get_ref().1.peer_certificates();
    let end_point = certificates
        .and_then(|chain| chain.first())
        .and_then(|certificate| certificate::end_point_hash(certificate));
    Ok(Secured { socket: Box::new(stream), end_point })
}

fn handshake_error(error: std::io::Error) -> Error {
    let error = Error::new(Kind::Postgres, format_args!("TLS: {error}"));
    let text = error.message().to_string();
    match text {
        t if t.contains("UnknownIssuer") => error.remedy(
            "give sslrootcert= the PEM file of the certificate authority that signed the server's certificate",
        ),
        t if t.contains("not valid for name") => error.remedy(
            "use a host= that the server's certificate has among its subjectAltNames (a common name does not \
             count), or sslmode=verify-ca",
        ),
        t if t.contains("UnsupportedCertVersion") => {
            error.remedy("issue the server's certificate as X.509 version 3, with a subjectAltName")
        }
        _ => error,
    }
}

/// The name to check the certificate against, and to tell the server.
fn server_name(ssl: &Ssl, host: &Host, peer: std::net::IpAddr) -> Result<ServerName<'static>> {
    let name = match &host.place {
        Place::Network { name: Some(name), .. } => ServerName::try_from(name.clone()).ok(),
        _ => None,
    };
    match name {
        Some(name) => Ok(name),
        None if ssl.mode == SslMode::VerifyFull => {
            Err(Error::new(Kind::Config, "sslmode=verify-full has no host name to check")
                .remedy("give host= the name in the server's certificate; hostaddr= may stay"))
        }
        None => Ok(ServerName::from(peer)),
    }
}

fn client_config(ssl: &Ssl) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Verifier { trust: trust(ssl, &provider)?, provider: provider.clone() });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::new(Kind::Bug, error))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    match &ssl.identity {
        None => Ok(builder.with_no_client_auth()),
        Some((certificate, key)) => builder
            .with_client_auth_cert(read_certificates(certificate)?, read_key(key)?)
            .map_err(|error| Error::new(Kind::Config, error))
            .context(format_args!(
                "sslcert {} with sslkey {}",
                certificate.display(),
                key.display()
            )),
    }
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bad = |reason: String| {
        Error::new(Kind::Config, format_args!("certificates {}: {reason}", path.display()))
            .remedy("name a readable PEM file with at least one certificate")
    };
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| bad(error.to_string()))?;
    match certificates.is_empty() {
        true => Err(bad("no certificate in it".into())),
        false => Ok(certificates),
    }
}

/// As libpq: others may not read it, but the group may if root owns it.
fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let named = format!("sslkey {}", path.display());
    let metadata = std::fs::metadata(path)
        .map_err(|error| Error::new(Kind::Config, format_args!("{named}: {error}")))?;
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.permissions().mode() & forbidden != 0 {
        return Err(Error::new(Kind::Config, format_args!("{named}: can be read by others"))
            .remedy(format_args!("chmod 0600 {}", path.display())));
    }
    PrivateKeyDer::from_pem_file(path).map_err(|error| {
        Error::new(Kind::Config, format_args!("{named}: {error}"))
            .remedy("name an unencrypted PEM private key")
    })
}

/// Which certificates are believed.
#[derive(Debug)]
enum Trust {
    /// Any: the connection is hidden from listeners, and the server may be anyone.
    Anyone,
    Roots {
        chains: Arc<WebPkiServerVerifier>,
        /// The roots themselves: a server may show one as its own, which `webpki` takes for misuse.
        own: Vec<CertificateDer<'static>>,
        name_matters: bool,
    },
}

fn trust(ssl: &Ssl, provider: &Arc<CryptoProvider>) -> Result<Trust> {
    let (roots, name_matters) = match (ssl.mode, &ssl.roots) {
        (SslMode::VerifyFull, Some(roots)) => (roots, true),
        (SslMode::VerifyCa | SslMode::Require, Some(roots)) => (roots, false),
        (SslMode::VerifyCa | SslMode::VerifyFull, None) => {
            return Err(Error::new(
                Kind::Config,
                "no root certificate to check the server's against",
            )
            .remedy("give sslrootcert= a PEM file, or sslrootcert=system"));
        }
        _ => return Ok(Trust::Anyone),
    };
    let own = match roots {
        Roots::File(path) => read_certificates(path)?,
        Roots::System => rustls_native_certs::load_native_certs().certs,
    };
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(own.iter().cloned());
    if added == 0 {
        return Err(Error::new(
            Kind::Config,
            "no usable root certificate to check the server's against",
        )
        .remedy("give sslrootcert= the PEM file of an X.509 version 3 certificate"));
    }
    let chains = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone())
        .build()
        .map_err(|error| Error::new(Kind::Config, format_args!("root certificates: {error}")))?;
    Ok(Trust::Roots { chains, own, name_matters })
}

#[derive(Debug)]
struct Verifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Trust::Roots { chains, own, name_matters } = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        if own.contains(end_entity) {
            return verify_root(end_entity, server_name, *name_matters, now);
        }
        // The chain is judged before the name, so a wrong name says that the chain is right.
        match chains.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !name_matters => Ok(ServerCertVerified::assertion()),
            judged => judged,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Judges a server that shows a trusted root as its own certificate: the self-signed kind.
fn verify_root(
    certificate: &CertificateDer<'_>,
    name: &ServerName<'_>,
    name_matters: bool,
    now: UnixTime,
) -> Result<ServerCertVerified, rustls::Error> {
    let now = jiff::Timestamp::from_second(now.as_secs() as i64).map(PgTime::from);
    if !now.is_ok_and(|now| certificate::is_valid_at(certificate, now)) {
        return Err(CertificateError::Expired.into());
    }
    if name_matters {
        rustls::client::verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
    }
    Ok(ServerCertVerified::assertion())
}
