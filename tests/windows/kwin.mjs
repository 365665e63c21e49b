// Runs the KWin script against a workspace as Plasma 5.27 has it, and as Plasma 6 has it.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import vm from "node:vm";

const source = readFileSync(new URL("../../config/kwin/nightporter/contents/code/main.js", import.meta.url), "utf8");

class Signal {
    #handlers = [];
    connect(handler) { this.#handlers.push(handler); }
    emit(...args) { for (const handler of this.#handlers) { handler(...args); } }
}

const screen = { x: 0, y: 0, width: 360, height: 720 };

function makeWindow(desktopFileName, desktop, six, more = {}) {
    return {
        desktopFileName, normalWindow: true, specialWindow: false, fullScreen: false, minimized: false, hidden: false,
        deleted: false, opacity: 1, onAllDesktops: false, frameGeometry: { ...screen },
        ...(six ? { desktops: [{ id: desktop }] } : { desktop }),
        ...(six ? { minimizedChanged: new Signal() } : { clientMinimized: new Signal(), clientUnminimized: new Signal() }),
        ...more,
    };
}

function run(six, already = []) {
    const said = [];
    const list = [];
    const workspace = { currentDesktopChanged: new Signal(), ...(six ? { stackingOrder: list } : {}) };
    const [added, removed, activated, active] = six
        ? ["windowAdded", "windowRemoved", "windowActivated", "activeWindow"]
        : ["clientAdded", "clientRemoved", "clientActivated", "activeClient"];
    for (const name of [added, removed, activated]) { workspace[name] = new Signal(); }
    workspace[active] = null;
    workspace.currentDesktop = six ? { id: 1 } : 1;
    workspace[six ? "windowList" : "clientList"] = () => list;
    const desk = {
        open(name, desktop = 1, more = {}) {
            const window = makeWindow(name, desktop, six, more);
            list.push(window);
            workspace[added].emit(window);
            return window;
        },
        activate(window) {
            if (window) { list.push(...list.splice(list.indexOf(window), 1)); }
            workspace[active] = window;
            workspace[activated].emit(window);
        },
        minimize(window, minimized) {
            window.minimized = minimized;
            (six ? window.minimizedChanged : minimized ? window.clientMinimized : window.clientUnminimized).emit();
        },
        close(window) {
            // KWin 5.27 may still have it in the list.
            if (six) { list.splice(list.indexOf(window), 1); }
            if (workspace[active] === window) { workspace[active] = null; }
            workspace[removed].emit(window);
            if (!six) { list.splice(list.indexOf(window), 1); }
        },
        desktop(number) {
            workspace.currentDesktop = six ? { id: number } : number;
            workspace.currentDesktopChanged.emit();
        },
        said() { return said.splice(0); },
    };
    for (const name of already) { list.push(makeWindow(name, 1, six)); }
    const callDBus = (service, path, interface_, method, app, state) => {
        assert.deepEqual([service, path, interface_, method],
            ["org.nightporter1", "/org/nightporter1", "org.nightporter1.App", "SetStateOf"]);
        said.push(`${app} ${state}`);
    };
    vm.runInNewContext(source, { workspace, callDBus });
    return desk;
}

for (const six of [false, true]) {
    let desk = run(six, ["org.a.Early"]);
    assert.deepEqual(desk.said(), ["org.a.Early foreground"]);

    // What is said only where it is known what lies above what.
    const covered = (said) => (six ? [said] : []);
    const uncovered = covered;

    desk = run(six);
    const a = desk.open("org.a.A");
    desk.activate(a);
    assert.deepEqual(desk.said(), ["org.a.A foreground"]);
    const b = desk.open("org.a.B.desktop");
    desk.activate(b);
    assert.deepEqual(desk.said(), ["org.a.B foreground", ...covered("org.a.A background")]);
    desk.activate(a);
    assert.deepEqual(desk.said(), [...uncovered("org.a.A foreground"), ...covered("org.a.B background")]);
    desk.minimize(a, true);
    desk.activate(null);
    assert.deepEqual(desk.said(), [...uncovered("org.a.B foreground"), "org.a.A background"]);
    desk.minimize(a, false);
    desk.activate(a);
    desk.said();
    desk.close(a);
    assert.deepEqual(desk.said().sort(), ["org.a.A background", ...uncovered("org.a.B foreground")]);
    desk.activate(b);
    desk.desktop(2);
    desk.activate(null);
    assert.deepEqual(desk.said(), ["org.a.B background"]);
    desk.desktop(1);
    assert.deepEqual(desk.said(), ["org.a.B foreground"]);

    // What does not cover all of it leaves it in sight: it is small, translucent, or not active.
    for (const more of [
        { frameGeometry: { x: 9, y: 9, width: 99, height: 99 } },
        { opacity: 0.9 },
    ]) {
        const above = desk.open("org.a.Above", 1, more);
        desk.activate(above);
        assert.deepEqual(desk.said(), ["org.a.Above foreground"], JSON.stringify(Object.keys(more)));
        desk.close(above);
        assert.deepEqual(desk.said(), ["org.a.Above background"]);
    }
    const idle = desk.open("org.a.Above");
    assert.deepEqual(desk.said(), ["org.a.Above foreground"]);
    desk.close(idle);
    // Two windows: one in sight is enough. No window of an app: panels, and what has no name.
    const second = desk.open("org.a.B");
    desk.activate(second);
    desk.said();
    desk.minimize(second, true);
    assert.deepEqual(desk.said().filter((said) => said.startsWith("org.a.B")), []);
    desk.open("org.kde.plasmashell", 1, { specialWindow: true, normalWindow: false });
    desk.open("", 1);
    assert.deepEqual(desk.said(), []);
}
