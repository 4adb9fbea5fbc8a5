//! SQL over a server's Unix socket.

use super::SUPERUSER;
use anyhow::{Context, Result};
use std::ops::Deref;
use std::path::PathBuf;
use std::time::Duration;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

/// Where a server listens.
#[derive(Clone, Debug)]
pub struct Address {
    pub socket_dir: PathBuf,
    pub port: u16,
}

impl Address {
    /// A session as superuser.
    pub async fn connect(&self, database: &str) -> Result<Session> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(&self.socket_dir)
            .port(self.port)
            .user(SUPERUSER)
            .dbname(database)
            .application_name("backstay-tests")
            .connect_timeout(Duration::from_secs(10));
        let (client, connection) = config.connect(NoTls).await.map_err(explain)?;
        let task = tokio::spawn(async move {
            // The client's next call says what became of the connection.
            let _ = connection.await;
        });
        Ok(Session { client, task })
    }
}

/// An open connection; closed when dropped. Everything that [`Client`] does.
#[derive(Debug)]
pub struct Session {
    client: Client,
    task: tokio::task::JoinHandle<()>,
}

impl Session {
    /// The first column of the first row, as text; an empty string for NULL.
    pub async fn value(&self, query: &str) -> Result<String> {
        let rows = self.rows(query).await?;
        let first = rows.into_iter().next().and_then(|row| row.into_iter().next());
        first.with_context(|| format!("no row: {query}"))
    }

    /// All rows as text; NULL is an empty string.
    pub async fn rows(&self, query: &str) -> Result<Vec<Vec<String>>> {
        let messages =
            self.client.simple_query(query).await.map_err(explain).context(query.to_owned())?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|i| row.get(i).unwrap_or_default().to_owned()).collect())
            }
            _ => None,
        });
        Ok(rows.collect())
    }
}

impl Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The client's errors say "db error"; the server's words are one level down.
pub(crate) fn explain(error: tokio_postgres::Error) -> anyhow::Error {
    match error.as_db_error() {
        Some(server) => {
            let (code, message) = (server.code().code().to_owned(), server.message().to_owned());
            anyhow::Error::new(error).context(format!("{code}: {message}"))
        }
        None => anyhow::Error::new(error),
    }
}
