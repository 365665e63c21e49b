//! A device's WebSocket: performs what `session` decides.

use std::{ops::ControlFlow, sync::Arc, time::Duration};

use axum::extract::ws::{CloseFrame, Message as Frame, WebSocket};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    autopush::{self, ChannelId},
    clock,
    database::Registered,
    server::{Relay, ended},
    session::{Output, Session},
    store::{ClientEvent, Gate, Kick},
    token::{self, Uaid},
    vapid::Key,
};

/// How long a device may take to answer a close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

struct Socket {
    relay: Arc<Relay>,
    number: u64,
    frames: WebSocket,
    session: Session,
    gate: Arc<Gate>,
    events: Option<mpsc::Receiver<ClientEvent>>,
    /// Kept for the goodbye: a closed session has forgotten it.
    uaid: Option<Uaid>,
}

/// Serve one device until it or the server ends.
pub(crate) async fn run(frames: WebSocket, relay: Arc<Relay>) {
    let number = relay.next_session();
    let session = Session::new(relay.times, relay.limits, Instant::now().into_std());
    let shutdown = relay.shutdown.clone();
    let gate = Arc::new(Gate::default());
    let mut socket = Socket { relay, number, frames, session, gate, events: None, uaid: None };
    log::debug!("session {number}: opened");
    socket.serve(shutdown).await;
    log::debug!("session {number}: ended");
    if let Some(uaid) = socket.uaid.take() {
        socket.relay.store.goodbye(uaid, number).await;
    }
}

impl Socket {
    async fn serve(&mut self, mut shutdown: watch::Receiver<bool>) {
        loop {
            while let Some(output) = self.session.poll_output() {
                if self.perform(output).await.is_break() {
                    return;
                }
            }
            if let Some(kick) = self.gate.kick() {
                self.session.handle_kick(kick);
                continue;
            }
            // Only when what was queued before is out, or it would be overtaken.
            if self.events.as_ref().is_some_and(mpsc::Receiver::is_empty) && self.gate.take_lagging() {
                log::debug!("session {}: is behind, it reads from the database", self.number);
                self.session.handle_lagging();
                continue;
            }
            tokio::select! {
                event = next(&mut self.events) => self.handle_event(event),
                frame = self.frames.recv(), if self.session.reads() => {
                    if self.handle_frame(frame).is_break() {
                        return;
                    }
                }
                () = self.gate.raised() => {}
                () = sleep_until(self.session.deadline().into()) => {
                    self.session.handle_timeout(Instant::now().into_std());
                }
                () = ended(&mut shutdown) => self.session.handle_shutdown(),
            }
        }
    }

    fn handle_event(&mut self, event: ClientEvent) {
        self.session.handle_event(event, Instant::now().into_std(), clock::unix_now());
        if self.uaid.is_none() {
            self.uaid = self.session.uaid().cloned();
        }
    }

    fn handle_frame(&mut self, frame: Option<Result<Frame, axum::Error>>) -> ControlFlow<()> {
        let now = Instant::now().into_std();
        match frame {
            Some(Ok(Frame::Text(text))) => self.session.handle_text(&text, now),
            Some(Ok(Frame::Binary(_))) => self.session.handle_binary(),
            Some(Ok(Frame::Pong(_))) => self.session.handle_pong(now),
            // Answered by the WebSocket layer.
            Some(Ok(Frame::Ping(_) | Frame::Close(_))) => {}
            Some(Err(error)) => {
                log::debug!("session {}: {error}", self.number);
                self.session.handle_violation();
            }
            None => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    async fn perform(&mut self, output: Output) -> ControlFlow<()> {
        let store = &self.relay.store;
        match output {
            Output::Send(text) => return self.write(Frame::Text(text.into())).await,
            Output::Ping => return self.write(Frame::Ping(Vec::new().into())).await,
            Output::Hello(uaid) => match Uaid::random() {
                Ok(fresh) => self.events = Some(store.hello(uaid, fresh, self.number, self.gate.clone()).await),
                Err(error) => {
                    log::error!("{error}");
                    self.session.handle_kick(Kick::Storage);
                }
            },
            Output::Fetch(uaid, after) => store.fetch(uaid, self.number, after).await,
            Output::Register(uaid, channel, key) => {
                let text = register(&self.relay, uaid, &channel, key).await;
                return self.write(Frame::Text(text.into())).await;
            }
            Output::Unregister(uaid, channel) => {
                let status = if store.unregister(uaid, channel.clone()).await.is_ok() { 200 } else { 500 };
                return self.write(Frame::Text(autopush::unregister(&channel, status).into())).await;
            }
            Output::Acknowledge(uaid, versions) => store.acknowledge(uaid, versions).await,
            Output::Forget(uaid) => {
                log::warn!("session {}: the device read more than --message-limit messages and is reset", self.number);
                store.forget(uaid).await;
            }
            Output::Close(code, reason) => {
                log::debug!("session {}: closed with {code} ({reason})", self.number);
                self.close(code, reason).await;
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    async fn write(&mut self, frame: Frame) -> ControlFlow<()> {
        let gate = &self.gate;
        let kicked = async {
            while gate.kick().is_none() {
                gate.raised().await;
            }
        };
        tokio::select! {
            sent = self.frames.send(frame) => match sent {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            },
            () = sleep(self.relay.times.write_timeout) => {
                log::info!("session {}: cut off, it does not read", self.number);
                ControlFlow::Break(())
            }
            () = kicked => ControlFlow::Break(()),
        }
    }

    /// Say why, then read until the peer has answered: unread input would turn our close into a reset.
    async fn close(&mut self, code: u16, reason: &'static str) {
        let frame = Frame::Close(Some(CloseFrame { code, reason: reason.into() }));
        let farewell = async {
            if self.frames.send(frame).await.is_ok() {
                while let Some(Ok(_)) = self.frames.recv().await {}
            }
        };
        // It ends either way.
        let _ = timeout(CLOSE_TIMEOUT, farewell).await;
    }
}

async fn register(relay: &Relay, uaid: Uaid, channel: &ChannelId, key: Option<String>) -> String {
    let key = match key.as_deref().map(Key::parse) {
        None => None,
        Some(Some(key)) => Some(key),
        Some(None) => return autopush::register(channel, 400, "key must be a P-256 public key in base64url"),
    };
    let Ok(token) = token::capability() else { return autopush::register(channel, 500, "no random numbers") };
    match relay.store.register(uaid, channel.clone(), key, token).await {
        Ok(Registered::Token(token)) => autopush::register(channel, 200, &relay.endpoint(&token)),
        Ok(Registered::TooManyUsers) => autopush::register(channel, 500, "this server has no room for more devices"),
        Ok(Registered::TooManyChannels) => autopush::register(channel, 500, "this device has too many channels"),
        Err(error) => autopush::register(channel, 500, &error.to_string()),
    }
}

/// The next event; never, before hello or when the store has let go of the device.
async fn next(events: &mut Option<mpsc::Receiver<ClientEvent>>) -> ClientEvent {
    if let Some(receiver) = events
        && let Some(event) = receiver.recv().await
    {
        return event;
    }
    std::future::pending().await
}
