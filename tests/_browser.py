"""A headless Chromium, driven through its DevTools protocol, and a JupyterLab for it to open.

    python tests/_browser.py page FILE.html OUT.png [WIDTH]   # a picture of a page
    python tests/_browser.py lab NOTEBOOK.ipynb OUT.png       # all cells run in JupyterLab, then a picture"""
import base64, contextlib, json, os, shutil, socket, subprocess, sys, tempfile, time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

root = Path(__file__).resolve().parent.parent
names = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'


def find_chromium():
    "Path of a Chromium, or None"
    return os.environ.get('CHROMIUM') or next((p for n in names if (p := shutil.which(n))), None)


def wait_for(f, seconds, what):
    "The first true value of `f()`, asked again and again"
    end, last = time.monotonic()+seconds, None
    while time.monotonic() < end:
        try:
            if v := f(): return v
        except (URLError, OSError, KeyError) as e: last = e
        time.sleep(0.2)
    raise TimeoutError(f'{what}: not within {seconds} s{f" ({last})" if last else ""}')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def process(args, log, **kw):
    "A program while the block lasts; its output goes to the file `log`"
    with open(log, 'wb') as f:
        p = subprocess.Popen(args, stdout=f, stderr=subprocess.STDOUT, **kw)
        try: yield p
        finally:
            p.terminate()
            try: p.wait(20)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()


class Page:
    "One tab"
    def __init__(self, url):
        import websocket
        self.ws, self.n = websocket.create_connection(url, timeout=120, suppress_origin=True), 0
        self.call('Page.enable')
        self.call('Runtime.enable')

    def call(self, method, **params):
        "One command of the protocol, and its answer"
        self.n += 1
        self.ws.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while True:
            o = json.loads(self.ws.recv())
            if o.get('id') == self.n:
                if 'error' in o: raise RuntimeError(f'{method}: {o["error"]["message"]}')
                return o['result']

    def js(self, code):
        "The value of an expression in the page"
        r = self.call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in r:
            raise RuntimeError(
                r['exceptionDetails']
                .get('exception', {})
                .get('description', str(r['exceptionDetails']))
            )
        return r['result'].get('value')

    def go(self, url): self.call('Page.navigate', url=url)
    def wait(self, code, seconds=60, what=None): return wait_for(lambda: self.js(code), seconds, what or code)
    def size(self, w, h):
        args = dict(width=w, height=h, deviceScaleFactor=1, mobile=False)
        self.call('Emulation.setDeviceMetricsOverride', **args)

    def click(self, code):
        "A click of the mouse into the middle of the element that the expression gives"
        x, y = self.js(
            f'(()=>{{const e={code}; e.scrollIntoView({{block:"center"}}); const '
            f'r=e.getBoundingClientRect(); return [r.x+r.width/2, r.y+r.height/2]}})()'
        )
        self.call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png')['data']))


@contextlib.contextmanager
def chromium(tmp, width=1400, height=1000):
    "A `Page` in a new browser"
    port = free_port()
    args = [find_chromium(), '--headless=new', f'--remote-debugging-port={port}',
        f'--user-data-dir={tmp}/profile', f'--window-size={width},{height}',
            '--no-first-run', '--disable-gpu', '--disable-dev-shm-usage',
                '--disable-background-networking', '--disable-component-update',
                    '--hide-scrollbars', '--no-sandbox', 'about:blank']
    with process(args, Path(tmp)/'chromium.log', env=os.environ | {'HOME': str(tmp)}) as p:
        def tab():
            if p.poll() is not None: raise RuntimeError(f'Chromium has ended:\n'
                                                        f'{(Path(tmp)/"chromium.log").read_text()[-2000:]}')
            return next(o for o in json.load(urlopen(f'http://127.0.0.1:{port}/json', timeout=5)) if o[
                'type'] == 'page')
        page = Page(wait_for(tab, 90, f'Chromium answers (see {tmp}/chromium.log)')['webSocketDebuggerUrl'])
        page.size(width, height)
        try: yield page
        finally: page.ws.close()


@contextlib.contextmanager
def jupyterlab(tmp, folder, **env):
    """Address of a JupyterLab on loopback that shows `folder` and keeps its own settings in `tmp`;
    `{}` in it takes a path"""
    tmp, port, token = Path(tmp), free_port(), 'dmd2'
    Path(folder).mkdir(parents=True, exist_ok=True)
    settings = tmp/'settings'/'@jupyterlab'
    for name, values in {'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
        'notebook-extension/tracker': dict(windowingMode='none')}.items():
        p = settings/f'{name}.jupyterlab-settings'
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(json.dumps(values))
    env = (
        os.environ
        | {
            k: str(tmp / k.lower())
            for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')
        }
        | {
            'JUPYTERLAB_SETTINGS_DIR': str(tmp / 'settings'),
            'JUPYTERLAB_WORKSPACES_DIR': str(tmp / 'workspaces'),
            'PYTHONPATH': os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')])),
        }
        | env
    )
    args = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1',
        f'--port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}',
            f'--ServerApp.root_dir={folder}', '--LabApp.news_url=None',
                '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with process(args, tmp/'jupyterlab.log', env=env) as p:
        ask = Request(f'http://127.0.0.1:{port}/api/status', headers={'Authorization': f'token {token}'})
        def answers():
            if p.poll() is not None: raise RuntimeError(f'JupyterLab has ended:\n'
                                                        f'{(tmp/"jupyterlab.log").read_text()[-2000:]}')
            return urlopen(ask, timeout=5).status == 200
        wait_for(answers, 180, f'JupyterLab answers (see {tmp}/jupyterlab.log)')
        yield f'http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset'


prompts = (
    '[...document.querySelectorAll(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell '
    '.jp-InputPrompt")].map(o=>o.textContent.trim())'
)


def open_notebook(page, url):
    "Wait until the notebook is there and its kernel waits for work"
    page.go(url)
    page.wait('!!document.querySelector(".jp-NotebookPanel .jp-CodeCell")', 180, 'the notebook is shown')
    page.wait((
        '[...document.querySelectorAll(".jp-NotebookPanel '
        '.jp-Notebook-ExecutionIndicator")].some(o=>o.dataset.status=="idle")'
    ), 180, 'its kernel is idle')
    page.wait((
        'fetch("/api/kernels").then(r=>r.json()).then(k=>k.some(o=>o.execution_state=="idle" && '
        'o.connections>0))'
    ), 180, 'its kernel is connected')


def menu(page, *items):
    "Choose from the menu bar"
    page.click(f'[...document.querySelectorAll(".lm-MenuBar-itemLabel")].find(o=>o.textContent=="{items[0]}")')
    for item in items[1:]:
        found = f'[...document.querySelectorAll(".lm-Menu-itemLabel")].find(o=>o.textContent.startsWith("{item}"))'
        page.wait(f'!!{found}', 20, f'menu {item}')
        page.click(found)


def run_all(page, seconds=600, look=lambda: None):
    "All cells in a fresh kernel, to the end; `look()` is called while it runs. The errors that the notebook shows"
    tried = [-1e9]
    def ended():
        look()
        now = page.js(prompts)
        if any('*' in o for o in now): return False
        errors = page.js(
            '[...document.querySelectorAll(".jp-OutputArea-output")].map(o=>o.textContent)'
            '.filter(o=>o.includes("Traceback '
            '(most recent call last)"))'
        )
        if errors or all(any(c.isdigit() for c in o) for o in now): return [errors]
        if page.js('!!document.querySelector(".jp-Dialog")'):  # "Restart Kernel?"
            page.click('document.querySelector(".jp-Dialog .jp-mod-accept")')
        # the first time, or what was asked for got lost; a restart waits for the kernel
        elif time.monotonic() > tried[-1]+60:
            tried.append(time.monotonic())
            menu(page, 'Run', 'Restart Kernel and Run All Cells')
        return False
    return wait_for(ended, seconds, 'all cells have run')[0]


if __name__ == '__main__':
    kind, source, out, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        if kind == 'page':
            with chromium(tmp, int(rest[0]) if rest else 1400) as page:
                page.go(source if '://' in source else Path(source).resolve().as_uri())
                page.wait('document.readyState=="complete"')
                page.screenshot(out)
        else:
            source = Path(source).resolve()
            with jupyterlab(tmp, source.parent) as url, chromium(tmp) as page:
                open_notebook(page, url.format(source.name))
                print(*run_all(page), sep='\n')
                page.screenshot(out)
