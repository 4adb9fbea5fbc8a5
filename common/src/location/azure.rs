//! The clients of an Azure Blob Storage location.
//!
//! Credentials, in the usual order: the key or the shared access signature of the config, the environment (`AZURE_*`),
//! workload identity, a client secret, the machine's managed identity.

use super::cloud::{self, Stores};
use super::connector::Connector;
use super::settings::LocationSettings;
use crate::error::{Error, Kind, Result};
use object_store::ClientConfigKey;
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};

/// Builds both stores; asks nothing of the network.
pub(super) fn open(settings: &LocationSettings, container: &str) -> Result<Stores> {
    let builder = builder(settings, container)?;
    let value = |key| builder.get_config_value(&key).filter(|value| !value.is_empty());
    let client = |key| value(AzureConfigKey::Client(key));
    let connector = Connector::new(settings, &client)?;
    let allowed = client(ClientConfigKey::AllowHttp).as_deref() == Some("true");
    let endpoint = value(AzureConfigKey::Endpoint);
    let plain = cloud::is_plain_http(endpoint.as_deref(), allowed)?;
    let builder = builder.with_http_connector(connector);
    cloud::stores!(builder, settings, plain)
}

fn builder(settings: &LocationSettings, container: &str) -> Result<MicrosoftAzureBuilder> {
    let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(container);
    // The Azure CLI's own names, which the library does not know.
    for (variable, key) in [
        ("AZURE_STORAGE_ACCOUNT", AzureConfigKey::AccountName),
        ("AZURE_STORAGE_KEY", AzureConfigKey::AccessKey),
    ] {
        let value = std::env::var(variable).ok().filter(|value| !value.is_empty());
        if let (Some(value), None) = (value, builder.get_config_value(&key)) {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(account) = &settings.account {
        builder = builder.with_config(AzureConfigKey::AccountName, account);
    }
    if builder.get_config_value(&AzureConfigKey::AccountName).is_none() {
        return Err(Error::new(Kind::Config, "no storage account is given")
            .remedy("add: account = \"NAME\", or set AZURE_STORAGE_ACCOUNT"));
    }
    match (&settings.account_key, &settings.sas_token) {
        (Some(_), Some(_)) => {
            return Err(Error::new(Kind::Config, "both account-key and sas-token are given")
                .remedy("give one of them"));
        }
        (Some(key), None) => {
            builder = builder
                .with_config(AzureConfigKey::AccessKey, key.expose())
                .with_config(AzureConfigKey::CredentialType, "access_key");
        }
        (None, Some(token)) => {
            builder = builder
                .with_config(AzureConfigKey::SasKey, token.expose())
                .with_config(AzureConfigKey::CredentialType, "sas_token");
        }
        (None, None) => {}
    }
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_config(AzureConfigKey::Endpoint, endpoint.trim_end_matches('/'));
    }
    if settings.allow_http {
        builder = builder.with_allow_http(true);
    }
    Ok(builder)
}
