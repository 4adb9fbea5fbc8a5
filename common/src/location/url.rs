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
    /// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`
    Bucket { store: Store, bucket: String, prefix: Path },
    /// `memory:`, for tests: every one that is opened is its own.
    #[cfg(any(test, feature = "testing"))]
    Memory,
}

/// Whose protocol a store speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Store {
    S3,
    Google,
    Azure,
}

const FORMS: &str = "write it as s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or \
    file:///FOLDER";

/// Takes `text` apart. No message repeats user information that the URL might hold.
pub(super) fn parse(text: &str) -> Result<Place> {
    if text.starts_with('/') {
        return Err(bad("a location is a URL, not a path").remedy(format!("write file://{text}")));
    }
    let url = Url::parse(text).map_err(|e| bad(format!("the URL cannot be read: {e}")))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("the URL holds a user name or password").remedy(
            "take it out of the URL, and give it in the key that is for it: access-key-id, account",
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("the URL has a '?' or '#' part").remedy(FORMS));
    }
    match url.scheme() {
        "file" => folder(&url),
        "s3" => bucket(Store::S3, &url),
        "gs" => bucket(Store::Google, &url),
        "az" => bucket(Store::Azure, &url),
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

fn bucket(store: Store, url: &Url) -> Result<Place> {
    let bucket = url.host_str().unwrap_or_default().to_string();
    let (what, marks, length_max) = match store {
        Store::S3 => ("bucket", "-._", 63),
        Store::Google => ("bucket", "-._", 222),
        Store::Azure => ("container", "-", 63),
    };
    let allowed =
        |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || marks.as_bytes().contains(&b);
    let is_name = (3..=length_max).contains(&bucket.len()) && bucket.bytes().all(allowed);
    if url.port().is_some() || !is_name {
        return Err(bad(format!("{bucket:?} is not the name of a {what}")).remedy(format!(
            "write {}://{}/PREFIX, the {what} being 3 to {length_max} of a-z, 0-9 and {marks:?}; \
             another server is given as endpoint",
            url.scheme(),
            what.to_uppercase()
        )));
    }
    let prefix = Path::from_url_path(url.path())
        .map_err(|e| bad(format!("the URL's prefix cannot be used: {e}")).remedy(FORMS))?;
    Ok(Place::Bucket { store, bucket, prefix })
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
        let acme = |store, prefix: &str| Place::Bucket {
            store,
            bucket: "acme-eu".into(),
            prefix: Path::parse(prefix).unwrap(),
        };
        assert_eq!(parse("s3://acme-eu/a/orders").unwrap(), acme(Store::S3, "a/orders"));
        assert_eq!(parse("s3://acme-eu/orders/").unwrap(), acme(Store::S3, "orders"));
        assert_eq!(parse("s3://acme-eu").unwrap(), acme(Store::S3, ""));
        assert_eq!(parse("gs://acme-eu/orders").unwrap(), acme(Store::Google, "orders"));
        assert_eq!(parse("az://acme-eu/a/orders").unwrap(), acme(Store::Azure, "a/orders"));
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
            "gs://ab/x",
            "az://acme.eu/x",
            "az://account.blob.core.windows.net/container",
            "gcs://acme/x",
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
