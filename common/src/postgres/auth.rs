//! Proving who we are: SCRAM-SHA-256 with and without channel binding, md5, and a password in clear inside TLS only.

use super::conninfo::{ChannelBindingPolicy, Conninfo, Host, Password};
use super::fault::{Report, closed, lost, unexpected};
use super::wire::{Frame, Wire};
use crate::{Error, Kind, Result};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message};
use postgres_protocol::message::frontend;

/// What a login needs to know.
pub(super) struct Login<'a> {
    pub info: &'a Conninfo,
    pub host: &'a Host,
    /// The database as the passfile names it.
    pub dbname: &'a str,
    pub is_encrypted: bool,
    /// The server certificate's hash, where TLS is on and has one.
    pub end_point: Option<Vec<u8>>,
}

impl Login<'_> {
    /// Answers what the server asks, until it lets us in. Not safe to drop and go on.
    pub async fn authenticate(&self, wire: &mut Wire) -> Result<()> {
        let mut bound = false;
        loop {
            match message(wire).await? {
                Message::AuthenticationOk => break,
                Message::AuthenticationSasl(body) => bound = self.scram(wire, &body).await?,
                Message::AuthenticationMd5Password(body) => {
                    self.refuse_unbound()?;
                    let password = self.password()?;
                    let hash = md5_hash(self.info.user.as_bytes(), password.reveal(), body.salt());
                    answer(wire, hash.as_bytes()).await?;
                }
                Message::AuthenticationCleartextPassword => self.cleartext(wire).await?,
                Message::AuthenticationGss | Message::AuthenticationSspi => {
                    return Err(unsupported("GSSAPI or SSPI"));
                }
                Message::AuthenticationKerberosV5 | Message::AuthenticationScmCredential => {
                    return Err(unsupported("an obsolete method"));
                }
                _ => return Err(unexpected("logging in")),
            }
        }
        match bound {
            true => Ok(()),
            false => self.refuse_unbound(),
        }
    }

    async fn cleartext(&self, wire: &mut Wire) -> Result<()> {
        if !self.is_encrypted {
            return Err(Error::new(
                Kind::Postgres,
                "the server asks for the password in clear on a connection without TLS; it was not sent",
            )
            .remedy(
                "use scram-sha-256 (or peer, on a socket) for this user in pg_hba.conf, or sslmode=verify-full",
            ));
        }
        self.refuse_unbound()?;
        answer(wire, self.password()?.reveal()).await
    }

    /// True if the exchange was bound to the TLS connection.
    async fn scram(&self, wire: &mut Wire, offered: &AuthenticationSaslBody) -> Result<bool> {
        let (mechanism, binding) = self.mechanism(offered)?;
        let password = self.password()?;
        let mut scram = ScramSha256::new(password.reveal(), binding);
        wire.put(|buf| frontend::sasl_initial_response(mechanism, scram.message(), buf))?;
        wire.flush().await.map_err(lost)?;
        let Message::AuthenticationSaslContinue(body) = message(wire).await? else {
            return Err(unexpected("logging in"));
        };
        scram.update(body.data()).map_err(|error| refused(&error))?;
        wire.put(|buf| frontend::sasl_response(scram.message(), buf))?;
        wire.flush().await.map_err(lost)?;
        // The server proves here that it knows the password too; a login without this is not one.
        let Message::AuthenticationSaslFinal(body) = message(wire).await? else {
            return Err(unexpected("logging in"));
        };
        scram.finish(body.data()).map_err(|error| refused(&error))?;
        Ok(mechanism == SCRAM_SHA_256_PLUS)
    }

    fn mechanism(
        &self,
        offered: &AuthenticationSaslBody,
    ) -> Result<(&'static str, ChannelBinding)> {
        let mechanisms: Vec<String> =
            offered.mechanisms().map(|m| Ok(m.to_string())).collect().map_err(lost)?;
        let has = |name: &str| mechanisms.iter().any(|m| m == name);
        let wanted = self.info.channel_binding != ChannelBindingPolicy::Disable;
        match &self.end_point {
            Some(hash) if wanted && has(SCRAM_SHA_256_PLUS) => {
                return Ok((
                    SCRAM_SHA_256_PLUS,
                    ChannelBinding::tls_server_end_point(hash.clone()),
                ));
            }
            _ => self.refuse_unbound()?,
        }
        if !has(SCRAM_SHA_256) {
            let names = mechanisms.join(", ");
            return Err(unsupported(&format!("none but {names}")));
        }
        // "We could, but you do not": lets the server notice if somebody took its offer away.
        let could = self.end_point.is_some() && wanted;
        let binding =
            if could { ChannelBinding::unrequested() } else { ChannelBinding::unsupported() };
        Ok((SCRAM_SHA_256, binding))
    }

    fn refuse_unbound(&self) -> Result<()> {
        if self.info.channel_binding != ChannelBindingPolicy::Require {
            return Ok(());
        }
        Err(Error::new(
            Kind::Postgres,
            "channel_binding=require, and this login has no channel binding",
        )
        .remedy("use TLS and scram-sha-256 for this user, or channel_binding=prefer"))
    }

    fn password(&self) -> Result<Password> {
        let found = self.info.password_for(self.host, self.dbname)?;
        // Streaming has a database name of its own in a passfile; the ordinary one does as well.
        let found = match found {
            None => self.info.password_for(self.host, &self.info.dbname)?,
            found => found,
        };
        found.ok_or_else(|| {
            let user = &self.info.user;
            Error::new(
                Kind::Postgres,
                format_args!("the server asks for {user}'s password, and there is none"),
            )
            .remedy(
                "give password= or PGPASSWORD, or a line in the passfile (~/.pgpass, mode 0600)",
            )
        })
    }
}

async fn answer(wire: &mut Wire, password: &[u8]) -> Result<()> {
    wire.put(|buf| frontend::password_message(password, buf))?;
    wire.flush().await.map_err(lost)
}

fn refused(error: &std::io::Error) -> Error {
    Error::new(Kind::Postgres, format_args!("SCRAM login: {error}"))
        .remedy("correct the password; if it is right, this is not the server it claims to be")
}

fn unsupported(method: &str) -> Error {
    Error::new(Kind::Postgres, format_args!("the server asks for a login by {method}"))
        .remedy("use scram-sha-256 (or peer, or cert) for this user in pg_hba.conf")
}

/// The next message of a login; notices are passed over.
pub(super) async fn message(wire: &mut Wire) -> Result<Message> {
    loop {
        match wire.frame().await.map_err(lost)? {
            Some(Frame::Message(Message::ErrorResponse(body))) => {
                return Err(Report::read(body.fields()).into_error());
            }
            Some(Frame::Message(Message::NoticeResponse(body))) => {
                tracing::debug!(notice = Report::read(body.fields()).text(), "PostgreSQL");
            }
            Some(Frame::NegotiateVersion) => {}
            Some(Frame::Message(message)) => return Ok(message),
            Some(Frame::CopyBoth) => return Err(unexpected("logging in")),
            None => return Err(closed()),
        }
    }
}
