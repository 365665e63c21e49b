//! Chromium without a window, told what to do by its DevTools protocol. It reaches nothing but the files it is given.

use std::{
    io::{BufRead, BufReader},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;
use tungstenite::{Message, WebSocket};

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Browser {
    child: Child,
    socket: WebSocket<TcpStream>,
    last: u64,
    /// Addresses it asked for.
    pub(crate) asked: Vec<String>,
    _profile: TempDir,
}

/// One page of it.
#[derive(Clone)]
pub(crate) struct Page(String);

impl Browser {
    pub(crate) fn start() -> Self {
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new("chromium");
        command
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--remote-debugging-port=0", "--hide-scrollbars", "--force-color-profile=srgb"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-extensions"])
            .args(["--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND", "--lang=en"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank");
        command.env("DBUS_SESSION_BUS_ADDRESS", "disabled:").env("DBUS_SYSTEM_BUS_ADDRESS", "disabled:");
        command.env("HOME", profile.path()).env("TZ", "UTC");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| {
            panic!(
                "chromium is needed to look at the report (Debian's package chromium: apt install chromium): {error}"
            )
        });
        let mut said = String::new();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let url = loop {
            let Some(Ok(line)) = lines.next() else { panic!("chromium ended:\n{said}") };
            if let Some(url) = line.strip_prefix("DevTools listening on ") {
                break url.to_owned();
            }
            said.push_str(&line);
        };
        // It says more as it goes, and must not wait for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        let host = url.strip_prefix("ws://").unwrap().split('/').next().unwrap().to_owned();
        let stream = TcpStream::connect(host).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let (socket, _) = tungstenite::client(url.as_str(), stream).unwrap();
        Self { child, socket, last: 0, asked: Vec::new(), _profile: profile }
    }

    pub(crate) fn page(&mut self) -> Page {
        let target = self.call(None, "Target.createTarget", json!({ "url": "about:blank" }));
        let id = target["targetId"].as_str().unwrap();
        let attached = self.call(None, "Target.attachToTarget", json!({ "targetId": id, "flatten": true }));
        let page = Page(attached["sessionId"].as_str().unwrap().to_owned());
        self.call(Some(&page), "Page.enable", json!({}));
        self.call(Some(&page), "Network.enable", json!({}));
        page
    }

    /// Opens a file as on a screen of this size.
    pub(crate) fn open(&mut self, page: &Page, file: &Path, (width, height): (u32, u32), dark: bool) {
        let screen = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call(Some(page), "Emulation.setDeviceMetricsOverride", screen);
        let scheme = if dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call(Some(page), "Emulation.setEmulatedMedia", media);
        self.go(page, &format!("file://{}", file.display()));
    }

    /// To an empty page, without a policy.
    pub(crate) fn leave(&mut self, page: &Page) {
        self.go(page, "about:blank");
    }

    fn go(&mut self, page: &Page, url: &str) {
        let navigated = self.call(Some(page), "Page.navigate", json!({ "url": url }));
        assert!(navigated.get("errorText").is_none(), "{navigated}");
        let loaded =
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', () => done()))";
        self.eval(page, loaded);
    }

    /// What a script gives back; not the page's own, so that its policy does not hold.
    pub(crate) fn eval(&mut self, page: &Page, script: &str) -> Value {
        let asked = json!({ "expression": script, "returnByValue": true, "awaitPromise": true });
        let answer = self.call(Some(page), "Runtime.evaluate", asked);
        assert!(answer.get("exceptionDetails").is_none(), "{answer}");
        answer["result"]["value"].clone()
    }

    /// The page as PNG, all of it or what fits the screen.
    pub(crate) fn screenshot(&mut self, page: &Page, whole: bool) -> Vec<u8> {
        let answer =
            self.call(Some(page), "Page.captureScreenshot", json!({ "format": "png", "captureBeyondViewport": whole }));
        STANDARD.decode(answer["data"].as_str().unwrap()).unwrap()
    }

    fn call(&mut self, page: Option<&Page>, method: &str, params: Value) -> Value {
        self.last += 1;
        let mut request = json!({ "id": self.last, "method": method, "params": params });
        if let Some(Page(session)) = page {
            request["sessionId"] = json!(session);
        }
        self.socket.send(Message::text(request.to_string())).unwrap();
        loop {
            let Message::Text(text) = self.socket.read().unwrap() else { continue };
            let mut answer: Value = serde_json::from_str(&text).unwrap();
            if answer["method"] == "Network.requestWillBeSent" {
                self.asked.push(answer["params"]["request"]["url"].as_str().unwrap().to_owned());
            }
            if answer["id"] == self.last {
                assert!(answer.get("error").is_none(), "{method}: {answer}");
                return answer["result"].take();
            }
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.socket.send(Message::text(json!({ "id": 0, "method": "Browser.close" }).to_string()));
        for _ in 0..50 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
