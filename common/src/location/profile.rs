//! Amazon's shared files: `~/.aws/credentials` and `~/.aws/config`.
//!
//! They are read again when they change, because tools renew what they hold. Profiles that only a tool of Amazon's can
//! follow (single sign-on, roles, processes) are refused by name.

use super::Secret;
use crate::error::{Error, Kind, Result};
use async_trait::async_trait;
use object_store::aws::AwsCredential;
use object_store::{CredentialProvider, Error as StoreError};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long what was read is believed.
const BELIEVED: Duration = Duration::from_secs(10);
/// What a profile may say instead of keys, and nothing here can follow.
const NOT_FOLLOWED: [&str; 5] =
    ["credential_process", "sso_session", "sso_start_url", "role_arn", "login_session"];

/// One profile of the two files.
#[derive(Debug)]
pub(super) struct Profile {
    name: String,
    credentials: PathBuf,
    config: PathBuf,
    region: Option<String>,
    last: Mutex<(Instant, Arc<AwsCredential>)>,
}

type Environment<'e> = &'e dyn Fn(&str) -> Option<String>;

impl Profile {
    /// The profile that the settings name.
    pub(super) fn named(name: &str, env: Environment<'_>) -> Result<Profile> {
        let Some((credentials, config)) = files(env) else {
            return Err(bad(name, "there is no home directory to find ~/.aws in")
                .remedy("set AWS_SHARED_CREDENTIALS_FILE"));
        };
        let (region, credential) = read(name, &credentials, &config)?.ok_or_else(|| {
            let places = format!("neither {} nor {}", credentials.display(), config.display());
            bad(name, &format!("{places} has keys for it")).remedy(format!(
                "add [{name}] with aws_access_key_id and aws_secret_access_key, or correct profile"
            ))
        })?;
        let last = Mutex::new((Instant::now(), Arc::new(credential)));
        Ok(Profile { name: name.to_string(), credentials, config, region, last })
    }

    /// The one that the environment names, or "default" if there is such a one with keys.
    pub(super) fn usual(env: Environment<'_>) -> Result<Option<Profile>> {
        match env("AWS_PROFILE").or_else(|| env("AWS_DEFAULT_PROFILE")) {
            Some(name) => Profile::named(&name, env).map(Some),
            None => {
                let Some((credentials, config)) = files(env) else { return Ok(None) };
                match read("default", &credentials, &config) {
                    Ok(Some(_)) => Profile::named("default", env).map(Some),
                    // Nobody asked for it: the platform's identity may do.
                    Ok(None) | Err(_) => Ok(None),
                }
            }
        }
    }

    pub(super) fn region(&self) -> Option<String> {
        self.region.clone()
    }

    fn current(&self) -> Result<Arc<AwsCredential>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0.elapsed() >= BELIEVED {
            let found = read(&self.name, &self.credentials, &self.config)?;
            let (_, found) = found.ok_or_else(|| bad(&self.name, "its keys are gone"))?;
            *last = (Instant::now(), Arc::new(found));
        }
        Ok(last.1.clone())
    }
}

#[async_trait]
impl CredentialProvider for Profile {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        self.current().map_err(|e| StoreError::Unauthenticated {
            path: self.credentials.display().to_string(),
            source: e.message().into(),
        })
    }
}

fn files(env: Environment<'_>) -> Option<(PathBuf, PathBuf)> {
    let place = |variable: &str, file: &str| {
        let usual = || Some(Path::new(&env("HOME")?).join(".aws").join(file));
        env(variable).map(PathBuf::from).or_else(usual)
    };
    Some((
        place("AWS_SHARED_CREDENTIALS_FILE", "credentials")?,
        place("AWS_CONFIG_FILE", "config")?,
    ))
}

fn bad(name: &str, reason: &str) -> Error {
    Error::new(Kind::Config, format!("profile {name:?}: {reason}"))
        .remedy("give access-key-id and secret-access-key, or correct the profile")
}

/// Region and keys; `None` if there are no keys, in files that may be missing.
fn read(
    name: &str,
    credentials: &Path,
    config: &Path,
) -> Result<Option<(Option<String>, AwsCredential)>> {
    let mut keys = BTreeMap::new();
    let in_config = match name {
        "default" => "default".to_string(),
        _ => format!("profile {name}"),
    };
    // What the first file says wins.
    for (path, section) in [(config, in_config), (credentials, name.to_string())] {
        match std::fs::read_to_string(path) {
            Ok(text) => keys.extend(section_of(&text, &section)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(bad(name, &format!("{}: {e}", path.display()))),
        }
    }
    let mut take = |key: &str| keys.remove(key).map(|value| value.expose().to_string());
    let region = take("region");
    match (take("aws_access_key_id"), take("aws_secret_access_key")) {
        (Some(key_id), Some(secret_key)) => {
            let token = take("aws_session_token");
            Ok(Some((region, AwsCredential { key_id, secret_key, token })))
        }
        (None, None) => match NOT_FOLLOWED.iter().find(|key| keys.contains_key(**key)) {
            Some(key) => Err(bad(name, &format!("it has {key}, which is not supported"))),
            None => Ok(None),
        },
        _ => Err(bad(name, "it has only one of aws_access_key_id and aws_secret_access_key")),
    }
}

/// The keys of `[section]`. Lines that are indented belong to a nested setting, and are none of ours.
fn section_of(text: &str, section: &str) -> BTreeMap<String, Secret> {
    let mut inside = false;
    let mut found = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with([' ', '\t', '#', ';'])) {
        if let Some(rest) = line.strip_prefix('[') {
            let title = rest.split(']').next().unwrap_or_default();
            inside = title.split_whitespace().eq(section.split_whitespace());
        } else if let (true, Some((key, value))) = (inside, line.split_once('=')) {
            found.insert(key.trim().to_ascii_lowercase(), Secret::new(value.trim()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREDENTIALS: &str = "# mine\n[default]\naws_access_key_id = AKIA1\naws_secret_access_key=s1\n\n\
        [ci]\naws_access_key_id=AKIA2\naws_secret_access_key = s2/+=\naws_session_token = t2\n\
        [half]\naws_access_key_id = AKIA3\n";
    const CONFIG: &str = "[default]\nregion = eu-central-1\n[profile ci]\nregion=us-east-2\n\
        s3 =\n  region = nested\n[profile sso]\nsso_session = corp\nregion = x\n";

    struct Home(tempfile::TempDir);

    impl Home {
        fn new() -> Home {
            let home = tempfile::tempdir().unwrap();
            std::fs::create_dir(home.path().join(".aws")).unwrap();
            std::fs::write(home.path().join(".aws/credentials"), CREDENTIALS).unwrap();
            std::fs::write(home.path().join(".aws/config"), CONFIG).unwrap();
            Home(home)
        }

        fn env<'h>(&'h self, profile: Option<&'h str>) -> impl Fn(&str) -> Option<String> + 'h {
            move |key| match key {
                "HOME" => Some(self.0.path().display().to_string()),
                "AWS_PROFILE" => profile.map(str::to_string),
                _ => None,
            }
        }
    }

    #[test]
    fn a_profile_has_its_keys_and_its_region() {
        let home = Home::new();
        let ci = Profile::named("ci", &home.env(None)).unwrap();
        let credential = ci.current().unwrap();
        assert_eq!((&*credential.key_id, &*credential.secret_key), ("AKIA2", "s2/+="));
        assert_eq!(credential.token.as_deref(), Some("t2"));
        assert_eq!(ci.region().as_deref(), Some("us-east-2"));
        let usual = Profile::usual(&home.env(None)).unwrap().unwrap();
        assert_eq!(usual.current().unwrap().key_id, "AKIA1");
        assert_eq!(usual.region().as_deref(), Some("eu-central-1"));
        let named = Profile::usual(&home.env(Some("ci"))).unwrap().unwrap();
        assert_eq!(named.current().unwrap().key_id, "AKIA2");
    }

    #[test]
    fn what_cannot_be_followed_is_refused_by_name() {
        let home = Home::new();
        for (name, word) in [("sso", "sso_session"), ("half", "only one"), ("none", "neither")] {
            let error = Profile::named(name, &home.env(None)).unwrap_err();
            assert_eq!(error.kind(), Kind::Config);
            assert!(error.message().contains(word), "{error}");
            assert!(error.remedy_text().is_some(), "{error}");
        }
        assert!(Profile::usual(&|_| None).unwrap().is_none());
    }

    #[test]
    fn renewed_keys_are_taken_up() {
        let home = Home::new();
        let ci = Profile::named("ci", &home.env(None)).unwrap();
        let renewed = CREDENTIALS.replace("AKIA2", "AKIA9");
        std::fs::write(home.0.path().join(".aws/credentials"), renewed).unwrap();
        assert_eq!(ci.current().unwrap().key_id, "AKIA2");
        ci.last.lock().unwrap().0 = Instant::now() - BELIEVED;
        assert_eq!(ci.current().unwrap().key_id, "AKIA9");
        std::fs::write(home.0.path().join(".aws/credentials"), "").unwrap();
        ci.last.lock().unwrap().0 = Instant::now() - BELIEVED;
        assert!(ci.current().unwrap_err().message().contains("gone"));
    }
}
