//! KDE's settings panel: `org.kde.kunifiedpush.Management` (push.md §1.8), as the panel of kunifiedpush 26.04 calls it.
//!
//! The panel shows one provider, knows four kinds of them by name and keeps the settings of each as a dictionary of
//! strings. It calls without asking for a reply, and shows `errorMessage` only where `status` says that something is
//! wrong; so a configuration that is refused is told to the one who sent it through these two, until the next is taken.

use std::{collections::HashMap, sync::Arc};

use zbus::{Message, Variant, message::Body};

use super::{
    interfaces::{MANAGEMENT, MANAGEMENT_PATH},
    request::{About, Answer, Call, Fault, Wording, arguments, check_token, invalid},
};
use crate::{
    action::PanelState,
    config::{Credentials, SecretSource, UpstreamKind, UpstreamSettings},
    event::{PanelRequest, Request},
    model::Secret,
};

/// The name KDE's panel looks for, beside those we always ask for.
pub(super) const KDE_NAME: &str = "org.unifiedpush.Distributor.kde";

/// What of `Reply::Panel` a call asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// `status`.
    Status,
    /// `errorMessage`.
    Error,
    /// `pushProviderId`.
    Provider,
    /// `pushProviderConfiguration` of this kind.
    Configuration(UpstreamKind),
    /// `registeredClients`.
    Clients,
}

/// What the core calls an upstream that was set up on a panel.
const UPSTREAM: &str = "kde";
/// `status` for "not set up": what KDE's own distributor says when it cannot use what the panel gave it.
const NO_SETUP: i32 = 5;
/// The longest URL and the longest of the other values, in bytes.
const URL: usize = 500;
const VALUE: usize = 1024;

/// Reads a call of the Management interface.
pub(super) fn read(member: &str, body: &Body) -> Result<Call, Fault> {
    let shown = match member {
        "setPushProvider" => return set_provider(body),
        "forceUnregisterClient" => {
            let token = arguments::<&str>(body)?;
            check_token(token)?;
            return Ok(ask(PanelRequest::ForceUnregister(token.into()), Wording::Empty));
        }
        "pushProviderConfiguration" => match kind(arguments::<&str>(body)?) {
            Some(kind) => Shown::Configuration(kind),
            // The panel asks for "" when nothing it knows is selected.
            None => return Ok(Call::Answer(Answer::EmptyDict)),
        },
        _ => {
            arguments::<()>(body)?;
            match member {
                "status" => Shown::Status,
                "errorMessage" => Shown::Error,
                "pushProviderId" => Shown::Provider,
                _ => Shown::Clients,
            }
        }
    };
    Ok(ask(PanelRequest::State, Wording::Panel(shown)))
}

/// Whether a call is one of `setPushProvider`.
pub(super) fn sets_provider(message: &Message) -> bool {
    let header = message.header();
    header.path().is_some_and(|path| path.as_str() == MANAGEMENT_PATH)
        && header.member().is_some_and(|member| member.as_str() == "setPushProvider")
}

/// The last configuration that was refused: whose it was, and why it was refused.
#[derive(Default)]
pub(super) struct Refusal(Option<(Arc<str>, String)>);

impl Refusal {
    /// `sender`'s configuration was refused. Gives back what tells it so.
    pub(super) fn note(&mut self, sender: &Arc<str>, reason: &str) -> Vec<Message> {
        self.0 = Some((Arc::clone(sender), reason.to_owned()));
        signals(Some(sender))
    }

    /// `sender`'s configuration was taken. Gives back what tells it that nothing is refused any more.
    pub(super) fn clear(&mut self, sender: &str) -> Vec<Message> {
        if self.of(sender).is_none() {
            return Vec::new();
        }
        self.0 = None;
        signals(Some(sender))
    }

    fn of(&self, sender: &str) -> Option<&str> {
        self.0.as_ref().filter(|(whose, _)| **whose == *sender).map(|(_, reason)| reason.as_str())
    }

    /// What `sender` is to see as the state.
    pub(super) fn apply(&self, sender: &str, state: &mut PanelState) {
        if let Some(reason) = self.of(sender) {
            state.status = NO_SETUP;
            reason.clone_into(&mut state.error);
        }
    }
}

/// The signals that make a panel read everything again: to everybody, or to one.
pub(super) fn signals(to: Option<&str>) -> Vec<Message> {
    let members = ["statusChanged", "errorMessageChanged", "pushProviderChanged", "registeredClientsChanged"];
    let signal = |member| {
        let signal = Message::signal(MANAGEMENT_PATH, MANAGEMENT, member);
        let signal = match to {
            Some(to) => signal.destination(to),
            None => signal,
        };
        signal.build(&()).inspect_err(|error| log::error!("cannot make the signal {member}: {error}")).ok()
    };
    members.into_iter().filter_map(signal).collect()
}

/// KDE's name of a kind of provider; empty for what its panel does not know, which then selects none.
pub(super) const fn provider(kind: UpstreamKind) -> &'static str {
    match kind {
        UpstreamKind::Gotify => "Gotify",
        UpstreamKind::NextPush => "NextPush",
        UpstreamKind::Ntfy => "Ntfy",
        UpstreamKind::Autopush => "Autopush",
        UpstreamKind::Mqtt => "",
    }
}

/// The settings of an upstream as the panel keeps them. It sends back all of them with what was changed, so a login
/// that is in a file is left out as a whole: it must not come back as one without its secret.
pub(super) fn configuration(settings: &UpstreamSettings) -> HashMap<&'static str, Variant<'static>> {
    // KDE's panel knows a NextPush server by its Nextcloud's address, and logs in there.
    let url = settings.http_url();
    let url = match settings.kind {
        UpstreamKind::NextPush => url.strip_suffix("index.php/apps/uppush/").unwrap_or(&url).to_owned(),
        _ => url,
    };
    let mut all = vec![("Url", url)];
    let given = |source: &SecretSource| match source {
        SecretSource::Given(secret) => Some(secret.reveal().to_owned()),
        SecretSource::File(_) | SecretSource::Credential(_) => None,
    };
    let login = match &settings.credentials {
        Credentials::None => None,
        Credentials::TokenFile(token) => given(token).map(|token| (None, token)),
        Credentials::Password { username, password } => {
            given(password).map(|password| (Some(username.to_string()), password))
        }
    };
    match (settings.kind, login) {
        (UpstreamKind::Gotify, login) => {
            all.push(("ClientToken", login.map(|(_, token)| token).unwrap_or_default()));
        }
        (UpstreamKind::NextPush, login) => {
            let (username, password) = login.unwrap_or_default();
            all.extend([("Username", username.unwrap_or_default()), ("AppPassword", password)]);
        }
        (UpstreamKind::Ntfy, Some((Some(username), password))) => {
            all.extend([("AuthMethod", "Basic".into()), ("Username", username), ("Secret", password)]);
        }
        (UpstreamKind::Ntfy, Some((None, token))) => {
            all.extend([("AuthMethod", "Bearer".into()), ("Secret", token)]);
        }
        (UpstreamKind::Ntfy | UpstreamKind::Autopush | UpstreamKind::Mqtt, _) => {}
    }
    all.into_iter().map(|(key, value)| (key, Variant::from(value))).collect()
}

fn kind(provider_id: &str) -> Option<UpstreamKind> {
    let known = [UpstreamKind::Gotify, UpstreamKind::NextPush, UpstreamKind::Ntfy, UpstreamKind::Autopush];
    known.into_iter().find(|kind| provider(*kind) == provider_id)
}

fn ask(request: PanelRequest, wording: Wording) -> Call {
    Call::Ask { request: Request::Panel(request), wording, about: About::Nobody }
}

fn set_provider(body: &Body) -> Result<Call, Fault> {
    let (provider_id, config) = arguments::<(&str, HashMap<&str, Variant<'_>>)>(body)?;
    let kind = kind(provider_id)
        .ok_or_else(|| invalid("the provider must be \"Gotify\", \"NextPush\", \"Ntfy\" or \"Autopush\"".into()))?;
    let config = Config(config);
    let mut settings = UpstreamSettings::new(UPSTREAM, kind, url(kind, config.needed("Url")?)?);
    settings.credentials = match kind {
        UpstreamKind::Gotify => Credentials::TokenFile(config.secret("ClientToken")?),
        UpstreamKind::NextPush => config.login("Username", "AppPassword")?,
        UpstreamKind::Ntfy => match config.text("AuthMethod")? {
            "" | "None" => Credentials::None,
            "Basic" => config.login("Username", "Secret")?,
            "Bearer" => Credentials::TokenFile(config.secret("Secret")?),
            _ => return Err(invalid("\"AuthMethod\" must be \"None\", \"Basic\" or \"Bearer\"".into())),
        },
        UpstreamKind::Autopush | UpstreamKind::Mqtt => Credentials::None,
    };
    Ok(ask(PanelRequest::SetProvider(Box::new(settings)), Wording::SetProvider))
}

/// What the panel sends: the keys of one provider. Others are ignored: `DeviceId`, for one, is NextPush's own name of
/// the device, which we have from the server.
struct Config<'b>(HashMap<&'b str, Variant<'b>>);

impl Config<'_> {
    fn text(&self, key: &str) -> Result<&str, Fault> {
        let text = match self.0.get(key) {
            None => "",
            Some(Variant::Str(text)) => text.as_str().trim(),
            Some(other) => {
                return Err(invalid(format!("\"{key}\" must be a string (s), not {}", other.value_signature())));
            }
        };
        // It goes into the header of a request.
        if text.len() > VALUE || text.chars().any(char::is_control) {
            return Err(invalid(format!("\"{key}\" must be at most {VALUE} bytes without control characters")));
        }
        Ok(text)
    }

    fn needed(&self, key: &str) -> Result<&str, Fault> {
        match self.text(key)? {
            "" => Err(invalid(format!("\"{key}\" is missing"))),
            text => Ok(text),
        }
    }

    fn secret(&self, key: &str) -> Result<SecretSource, Fault> {
        Ok(SecretSource::Given(Secret::new(self.needed(key)?)))
    }

    fn login(&self, username: &str, password: &str) -> Result<Credentials, Fault> {
        Ok(Credentials::Password { username: self.needed(username)?.into(), password: self.secret(password)? })
    }
}

/// People type "ntfy.example" and mean what a browser makes of it.
fn url(kind: UpstreamKind, typed: &str) -> Result<String, Fault> {
    if typed.len() > URL {
        return Err(invalid(format!("\"Url\" must be at most {URL} bytes")));
    }
    let url = if typed.contains("://") { typed.to_owned() } else { format!("https://{typed}") };
    kind.base_url(&url).map_err(|problem| invalid(format!("\"Url\": {problem}")))
}
