//! Where a location is: its URL, taken apart and checked before anything is asked of it.

use crate::error::{Error, Kind, Result};
use object_store::path::Path;
use std::path::{Component, PathBuf};
use url::Url;

/// What a URL stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// `file:///folder`
    Folder(PathBuf),
    /// `s3://bucket/prefix`
    Bucket { bucket: String, prefix: Path },
    /// `memory:`, for tests: every one that is opened is its own.
    #[cfg(any(test, feature = "testing"))]
    Memory,
}

const FORMS: &str = "write it as s3://BUCKET/PREFIX or file:///FOLDER";

/// Takes `text` apart. No message repeats user information that the URL might hold.
pub(super) fn parse(text: &str) -> Result<Place> {
    if text.starts_with('/') {
        return Err(bad("a location is a URL, not a path").remedy(format!("write file://{text}")));
    }
    let url = Url::parse(text).map_err(|e| bad(format!("the URL cannot be read: {e}")))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("the URL holds a user name or password").remedy(
            "take it out of the URL, and give access-key-id and secret-access-key instead",
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("the URL has a '?' or '#' part").remedy(FORMS));
    }
    match url.scheme() {
        "file" => folder(&url),
        "s3" => bucket(&url),
        #[cfg(any(test, feature = "testing"))]
        "memory" => Ok(Place::Memory),
        other => Err(bad(format!("{other}:// is not a kind of location")).remedy(FORMS)),
    }
}

fn bad(reason: impl std::fmt::Display) -> Error {
    Error::new(Kind::Config, reason)
}

fn folder(url: &Url) -> Result<Place> {
    let relative = || bad("a file:// URL needs an absolute path").remedy("write file:///FOLDER");
    if url.host_str().is_some_and(|host| !host.is_empty()) {
        return Err(relative());
    }
    let path = url.to_file_path().map_err(|()| relative())?;
    let plain = |c: Component<'_>| matches!(c, Component::RootDir | Component::Normal(_));
    if !path.components().all(plain) || path.parent().is_none() {
        return Err(bad(format!("{} cannot be a location's folder", path.display()))
            .remedy("name a folder below the root, without '..'"));
    }
    Ok(Place::Folder(path))
}

fn bucket(url: &Url) -> Result<Place> {
    let bucket = url.host_str().unwrap_or_default().to_string();
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
    if url.port().is_some() || !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(allowed) {
        return Err(bad(format!("{bucket:?} is not the name of a bucket")).remedy(
            "write s3://BUCKET/PREFIX, the bucket being 3 to 63 of a-z, 0-9, '-' and '.'; \
             another server is given as endpoint",
        ));
    }
    let prefix = Path::from_url_path(url.path())
        .map_err(|e| bad(format!("the URL's prefix cannot be used: {e}")).remedy(FORMS))?;
    Ok(Place::Bucket { bucket, prefix })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> Error {
        let error = parse(text).unwrap_err();
        assert_eq!(error.kind(), Kind::Config, "{text}");
        error
    }

    #[test]
    fn the_usual_forms() {
        assert_eq!(parse("file:///srv/a%20b").unwrap(), Place::Folder("/srv/a b".into()));
        let acme = |prefix: &str| Place::Bucket {
            bucket: "acme-eu".into(),
            prefix: Path::parse(prefix).unwrap(),
        };
        assert_eq!(parse("s3://acme-eu/a/orders").unwrap(), acme("a/orders"));
        assert_eq!(parse("s3://acme-eu/orders/").unwrap(), acme("orders"));
        assert_eq!(parse("s3://acme-eu").unwrap(), acme(""));
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in [
            "",
            "orders",
            "http://acme/orders",
            "file://host/srv",
            "file:///",
            "s3:///x",
            "s3://UPPER/x",
            "s3://ab/x",
            "s3://acme:9000/x",
            "s3://acme/a//b",
            "s3://acme/x?versionId=1",
        ] {
            refusal(text);
        }
        assert_eq!(refusal("/srv/b").remedy_text(), Some("write file:///srv/b"));
    }

    #[test]
    fn a_password_in_a_url_is_not_repeated() {
        let said = refusal("s3://AKIA:hunter22@acme/x").to_string();
        assert!(!said.contains("hunter22") && !said.contains("AKIA"), "{said}");
    }
}
