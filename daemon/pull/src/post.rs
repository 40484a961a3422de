//! [`Poster`]: small bodies to a server over TLS, for who has no client of its own. Pulls have the
//! only one that speaks it.

use std::time::Duration;

use crate::PullError;

/// Sends bodies to one URL.
#[derive(Debug, Clone)]
pub struct Poster {
    client: reqwest::Client,
    url: String,
    headers: Vec<(String, String)>,
}

impl Poster {
    /// Sends to `url` with these header fields, and gives up after `patience`. It follows no
    /// redirects, so that the headers go to nobody else.
    ///
    /// # Errors
    /// [`PullError::Client`] where the system has no certificates.
    pub fn new(
        url: String,
        headers: Vec<(String, String)>,
        patience: Duration,
    ) -> Result<Self, PullError> {
        // Fails only when a provider is there already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .user_agent(concat!("v4/", env!("CARGO_PKG_VERSION")))
            .timeout(patience)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|source| PullError::Client { source })?;
        Ok(Self { client, url, headers })
    }

    /// Sends a body of JSON; gives the status of the answer.
    ///
    /// # Errors
    /// Why there was none, in words.
    pub async fn post(&self, json: Vec<u8>) -> Result<u16, String> {
        let mut request = self.client.post(&self.url).header("content-type", "application/json");
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let answer = request.body(json).send().await;
        // The URL may have a key in it.
        let answer = answer.map_err(|error| {
            let error = error.without_url();
            let mut words = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                words = format!("{words}: {error}");
                cause = error.source();
            }
            words
        })?;
        Ok(answer.status().as_u16())
    }
}
