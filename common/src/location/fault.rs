//! What a store answered, in the terms of whoever must act on it.

use super::Location;
use super::disk;
use super::url::Store;
use crate::error::{Error, Kind};
use object_store::Error as StoreError;
use std::error::Error as StdError;
use std::io;

/// What a store's own words call for.
#[derive(Clone, Copy)]
enum Remedy {
    Say(&'static str),
    Credentials,
    Permissions,
}

use Remedy::{Credentials, Permissions, Say};

/// By a mark that the words contain. The first that matches counts.
const REMEDIES: [(&str, Remedy); 31] = [
    ("NoSuchBucket", Say("create the bucket, or correct the location's url")),
    ("ContainerNotFound", Say("create the container, or correct the location's url")),
    ("InvalidAccessKeyId", Credentials),
    ("SignatureDoesNotMatch", Credentials),
    ("ExpiredToken", Credentials),
    ("InvalidToken", Credentials),
    ("NotSignedUp", Credentials),
    ("AuthenticationFailed", Credentials),
    ("AuthenticationRequired", Credentials),
    ("NoAuthenticationInformation", Credentials),
    ("invalid_grant", Credentials),
    ("invalid_client", Credentials),
    ("failed to authenticate", Credentials),
    ("AccessDenied", Permissions),
    ("AuthorizationPermissionMismatch", Permissions),
    ("AuthorizationFailure", Permissions),
    ("RequestTimeTooSkewed", Say("set this host's clock")),
    (
        "ProtocolVersion",
        Say("the server does not speak TLS as new as tls-min: renew its TLS, or lower tls-min"),
    ),
    ("UnknownIssuer", Say("name the file with the certificate authority's certificate as ca-file")),
    ("certificate", Say("correct the endpoint, or the server's certificate")),
    ("redirect", Say("set region to the bucket's region")),
    ("169.254.169.254", Credentials),
    ("metadata.google.internal", Credentials),
    ("SlowDown", Say(OVERLOADED)),
    ("ServerBusy", Say(OVERLOADED)),
    ("TooManyRequests", Say(OVERLOADED)),
    ("status code: 429", Say(OVERLOADED)),
    ("status code: 503", Say(OVERLOADED)),
    ("dns error", Say("correct the endpoint or region, or look at this host's name resolution")),
    ("profile", Say("correct the profile in Amazon's shared files")),
    ("onnect", Say("see that the endpoint is right and can be reached from this host")),
];

const OVERLOADED: &str = "the store is overloaded: it is tried again";
const PERMISSIONS: &str = "allow this identity to list the bucket, and to get and put objects \
    under the prefix";

/// True if a store said that it has too much to do: the same may succeed soon.
pub fn is_overload(error: &Error) -> bool {
    error.remedy_text() == Some(OVERLOADED)
}

/// Words that a store has for what it keeps until a time: S3 and its look-alikes, Google, Azure. In lower case.
const LOCKS: [&str; 10] = [
    "object lock",
    "objectlock",
    "worm protected",
    "retentionpolicynotmet",
    "retention policy",
    "object retention",
    "underactivehold",
    "active hold",
    "event-based hold",
    "blobimmutable",
];

/// True if a deletion was refused because of an object lock, a retention policy or a hold: then it is as it should be, and the
/// same may succeed when that ends.
pub fn is_under_lock(error: &Error) -> bool {
    let reason = error.message().to_ascii_lowercase();
    LOCKS.iter().any(|lock| reason.contains(lock))
}

/// Words of those that do not let an identity do something. In lower case.
const DENIALS: [&str; 4] =
    ["accessdenied", "permission denied", "operation not permitted", "authorization"];

/// True if a store does not let this identity do something, and never will by itself.
pub fn is_denied(error: &Error) -> bool {
    let reason = error.message().to_ascii_lowercase();
    let is_told = error.remedy_text() == Some(PERMISSIONS);
    (is_told || DENIALS.iter().any(|denial| reason.contains(denial))) && !is_under_lock(error)
}

impl Store {
    fn credentials(self) -> &'static str {
        match self {
            Store::S3 => {
                "give access-key-id and secret-access-key, or AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY, or a profile, or run where the platform gives an identity"
            }
            Store::Google => {
                "give credentials-file, or GOOGLE_APPLICATION_CREDENTIALS, or run where the \
                 platform gives an identity"
            }
            Store::Azure => {
                "give account-key or sas-token, or AZURE_STORAGE_KEY, or run where the platform \
                 gives an identity"
            }
        }
    }
}

/// Enough for any server's reason, and not for a web page.
const REASON_CHARS_MAX: usize = 400;

impl Location {
    /// `error`, that came up while `doing` something to the object or folder at `path`.
    pub(super) fn fault(&self, doing: &str, path: &str, error: &StoreError) -> Error {
        let reason = reason(error);
        let said = |kind, what: &str| Error::new(kind, self.say(doing, path, what));
        match error {
            StoreError::NotFound { .. } if !is_about_bucket(&reason) => {
                said(Kind::Missing, &format!("no such object in {}", self.url()))
            }
            _ => match self.remedy(error, &reason) {
                Some(remedy) => said(Kind::Storage, &reason).remedy(remedy),
                None => said(Kind::Storage, &reason),
            },
        }
    }

    fn remedy(&self, error: &StoreError, reason: &str) -> Option<&'static str> {
        match self.0.store {
            None => remedy_on_disk(error),
            Some(store) => remedy_by_words(store, error, reason),
        }
    }

    /// "location virginia: read 7/pack/...: reason"
    pub(super) fn say(&self, doing: &str, path: &str, reason: &str) -> String {
        match path {
            "" => format!("location {}: {doing}: {reason}", self.name()),
            _ => format!("location {}: {doing} {path}: {reason}", self.name()),
        }
    }
}

fn is_about_bucket(reason: &str) -> bool {
    reason.contains("NoSuchBucket") || reason.contains("ContainerNotFound")
}

/// A store that cannot even be set up.
pub(super) fn config(doing: &str, url: &str, error: &StoreError) -> Error {
    Error::new(Kind::Config, format!("{doing} {url}: {}", reason(error)))
        .remedy("correct the location's settings, or the store's variables in the environment")
}

/// Whether a write that failed so cannot have reached the store, nor will the next.
pub(super) fn is_refusal(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::PermissionDenied { .. }
            | StoreError::Unauthenticated { .. }
            | StoreError::NotFound { .. }
            | StoreError::NotImplemented { .. }
            | StoreError::NotSupported { .. }
            | StoreError::InvalidPath { .. }
    )
}

fn remedy_by_words(store: Store, error: &StoreError, reason: &str) -> Option<&'static str> {
    let by_mark = REMEDIES.iter().find(|(mark, _)| reason.contains(mark)).map(|(_, to)| *to);
    let remedy = by_mark.or(match error {
        StoreError::PermissionDenied { .. } => Some(Permissions),
        StoreError::Unauthenticated { .. } => Some(Credentials),
        _ => None,
    });
    remedy.map(|remedy| match remedy {
        Say(text) => text,
        Permissions => PERMISSIONS,
        Credentials => store.credentials(),
    })
}

fn remedy_on_disk(error: &StoreError) -> Option<&'static str> {
    chain(error).find_map(|source| source.downcast_ref::<io::Error>()).and_then(disk::remedy)
}

/// The error and its sources in one line; of an answer in XML, only its code and message.
fn reason(error: &StoreError) -> String {
    let mut text = String::new();
    for source in chain(error) {
        let part = source.to_string();
        if text.is_empty() {
            text = part;
        } else if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
    }
    if let (Some(code), Some(message)) = (tag(&text, "Code"), tag(&text, "Message")) {
        text = format!("{code}: {message}");
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(REASON_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn tag<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(text, _)| text)
}

fn chain<'a>(error: &'a StoreError) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(
        Some(error as &'a (dyn StdError + 'static)),
        |e: &&'a (dyn StdError + 'static)| (*e).source(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: impl Into<Box<dyn StdError + Send + Sync>>) -> StoreError {
        StoreError::Generic { store: "S3", source: source.into() }
    }

    #[test]
    fn an_answer_in_xml_is_cut_to_what_it_says() {
        let body = "500: <?xml?><Error><Code>SlowDown</Code><Message>Please reduce\n it</Message>";
        assert_eq!(reason(&generic(body)), "SlowDown: Please reduce it");
        assert!(reason(&generic("x".repeat(9000))).len() < 500);
    }

    #[test]
    fn a_lock_is_told_from_a_lack_of_rights() {
        let is_lock = |reason: &str| is_under_lock(&Error::new(Kind::Storage, reason));
        for reason in [
            "AccessDenied: Access Denied because object protected by object lock.",
            "InvalidRequest: Object is WORM protected and cannot be overwritten",
            "RetentionPolicyNotMet: Object is subject to bucket's retention policy",
            "ObjectUnderActiveHold: Object is under active Temporary hold",
            "BlobImmutableDueToPolicy: This operation is not permitted",
        ] {
            assert!(is_lock(reason), "{reason}");
        }
        for reason in [
            "AccessDenied: Access Denied",
            "location worm: delete: AccessDenied: not authorized to perform: s3:DeleteObject on acme-lock-worm",
            "AuthorizationPermissionMismatch: This request is not authorized",
        ] {
            assert!(!is_lock(reason), "{reason}");
        }
    }

    #[test]
    fn a_full_or_forbidden_disk_has_its_remedy() {
        let error = generic(io::Error::from(io::ErrorKind::StorageFull));
        assert!(remedy_on_disk(&error).unwrap().contains("make room"));
        let error = generic(io::Error::from(io::ErrorKind::PermissionDenied));
        assert!(remedy_on_disk(&error).unwrap().contains("right to read and write"));
    }
}
